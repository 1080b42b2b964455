"""Where experts are at home when slots are caches: a pure function of layer, expert and view, equal in every role.

Knows no state and no clock. `placement` deals a layer's experts anew with each forecast, so that a group loads them
side by side; an expert that may have stayed in a slot must be sought in one place, whatever else is needed with it.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache

from odmoe_wire.messages import Member, Placing, SlotMode
from odmoe_wire.placement import place

# Views that are kept worked out: a process meets one at a time, tests many.
CACHED_VIEWS = 16


def homes(layer: int, experts: Iterable[int], members: Sequence[Member]) -> dict[int, str]:
    """Expert -> node id; empty when there are no members. A layer's experts are dealt round all nodes, each in the
    deal as often as it has slots, and every layer's deal starts one further."""
    if not members:
        return {}
    deal = _deal(tuple(members))
    return {expert: deal[(layer + expert) % len(deal)] for expert in sorted(set(experts))}


def placed(
    layer: int,
    experts: Iterable[int],
    members: Sequence[Member],
    group_size: int,
    *,
    mode: SlotMode,
    num_layers: int = 0,
    placing: Placing = "span",
) -> dict[int, str]:
    """Expert -> node id in a view of the mode: `homes` where slots are caches, else as `placement.place` says."""
    if mode != "on-demand":
        return homes(layer, experts, members)
    return place(layer, experts, members, group_size, num_layers, placing=placing)


@lru_cache(maxsize=CACHED_VIEWS)
def _deal(members: tuple[Member, ...]) -> tuple[str, ...]:
    """Each node once for each of its slots, a node's turns spread evenly; in whole numbers, so that no two machines
    round differently."""
    most = max(member.slots for member in members)
    turns = [
        ((2 * turn + 1) * most * 2**20 // max(1, member.slots), index)
        for index, member in enumerate(members)
        for turn in range(max(1, member.slots))
    ]
    return tuple(members[index].node_id for _, index in sorted(turns))
