"""Which node serves which expert: a pure function of layer, expert set and view, equal in every role.

Knows no state and no clock. OD-MoE section 3.1: workers form groups of `group_size` (top-k in the paper), layer
l is served by group l mod N_g, each expert of a layer goes to one worker. Where the counts do not divide, the
first groups are one worker larger.
"""

from collections.abc import Iterable, Sequence

from odmoe_wire.messages import Member


def groups(members: Sequence[Member], group_size: int) -> tuple[tuple[Member, ...], ...]:
    """Cut members into max(1, N // group_size) contiguous groups whose sizes differ by at most one."""
    if group_size < 1:
        raise ValueError(f"group_size must be at least 1, not {group_size}")
    if not members:
        return ()
    num_groups = max(1, len(members) // group_size)
    base, larger = divmod(len(members), num_groups)
    cut, start = [], 0
    for group in range(num_groups):
        size = base + (group < larger)
        cut.append(tuple(members[start : start + size]))
        start += size
    return tuple(cut)


def group_of(layer: int, members: Sequence[Member], group_size: int) -> tuple[Member, ...]:
    """The group that serves a layer; empty when there are no members."""
    cut = groups(members, group_size)
    return cut[layer % len(cut)] if cut else ()


def place(layer: int, experts: Iterable[int], members: Sequence[Member], group_size: int) -> dict[int, str]:
    """Expert -> node id: the sorted experts are dealt round the layer's group.

    The deal starts one worker further each time the layer comes round to the same group, so that with uneven
    expert counts no worker is always the one with more.
    """
    group = group_of(layer, members, group_size)
    if not group:
        return {}
    turn = layer // len(groups(members, group_size))
    return {expert: group[(turn + i) % len(group)].node_id for i, expert in enumerate(sorted(set(experts)))}
