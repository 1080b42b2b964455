"""Which node serves which expert: a pure function of layer, expert set and view, equal in every role.

Knows no state and no clock, and no number but whole ones, so that no two machines round differently. OD-MoE section
3.1: workers form groups of `group_size` (top-k in the paper), layer l is served by group l mod N_g, each expert of a
layer goes to one worker. Where the counts do not divide, the first groups are one worker larger.

Where nodes take unlike times to load an expert, those of one kind are grouped together, and each group gets layers in
proportion to how many it can turn round (`odmoe_wire.turns`). A node whose time is not known counts as a middling one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from heapq import heapify, heapreplace

from odmoe_wire.messages import Member, Placing
from odmoe_wire.turns import Worker, apportion, deal, part_neighbours, spread

# Views that are kept worked out: a process meets one at a time, tests many.
CACHED_VIEWS = 16
# Their groups are of few kinds.
CACHED_DEALS = 64


def groups(members: Sequence[Member], group_size: int) -> tuple[tuple[Member, ...], ...]:
    """Cut members into groups of `group_size` or a few more, those of a kind together, the fastest first.

    Equal members, in their order, make max(1, N // group_size) groups whose sizes differ by at most one."""
    if group_size < 1:
        raise ValueError(f"group_size must be at least 1, not {group_size}")
    return _groups(tuple(members), group_size)


def group_of(layer: int, members: Sequence[Member], group_size: int, num_layers: int = 0) -> tuple[Member, ...]:
    """The group that serves a layer; empty when there are no members. `num_layers` is the model's, 0 when not known:
    then unlike groups take turns as like ones do."""
    turn = _turn(layer, members, group_size, num_layers)
    return turn.group if turn else ()


def place(
    layer: int,
    experts: Iterable[int],
    members: Sequence[Member],
    group_size: int,
    num_layers: int = 0,
    *,
    placing: Placing = "span",
) -> dict[int, str]:
    """Expert -> node id: the sorted experts are dealt round the layer's group, first to free slots, then so that all
    workers have loaded at about the same time. With placing "expert" all experts there can be are dealt so, by speed
    alone: an expert's node does not depend on which others there are.

    The deal starts one worker further each time a layer comes round to the same group, so that with uneven
    expert counts no worker is always the one with more.
    """
    turn = _turn(layer, members, group_size, num_layers)
    wanted = sorted(set(experts))
    if turn is None or not wanted:
        return {}
    if placing == "expert":
        dealt = _deal_by_speed(turn.workers, _at_least(wanted[-1] + turn.start + 1))
        return {expert: turn.group[dealt[expert + turn.start]].node_id for expert in wanted}
    return {expert: turn.group[worker].node_id for expert, worker in zip(wanted, turn.deal(len(wanted)), strict=True)}


def deal_prompt(experts: Iterable[int], members: Sequence[Member]) -> dict[int, str]:
    """Expert -> node id for a prompt, over all workers in proportion to their speed, a worker with more slots first.
    An expert's node does not depend on which others there are."""
    wanted = sorted(set(experts))
    if not (wanted and members):
        return {}
    dealt = _deal_by_speed(_workers(members, _load_us(members)), _at_least(wanted[-1] + 1))
    return {expert: members[dealt[expert]].node_id for expert in wanted}


# ---------------------------------------------------------------------------------------------------------- insides


@dataclass(frozen=True, slots=True)
class _Turn:
    """A group's turn at a layer. `start` is the worker the deal begins with, `behind_us` what each worker has still
    to load of the group's turns before, as far as it is more than others have."""

    group: tuple[Member, ...]
    workers: tuple[Worker, ...]
    start: int
    behind_us: tuple[int, ...]

    def deal(self, num_experts: int) -> list[int]:
        """Which worker of the group gets the first expert, the second, and so on."""
        size = len(self.group)
        if num_experts <= size and not any(self.behind_us) and len(set(self.workers)) == 1:
            return [(self.start + number) % size for number in range(num_experts)]
        return deal(num_experts, self.workers, start=self.start, behind_us=self.behind_us)


def _turn(layer: int, members: Sequence[Member], group_size: int, num_layers: int) -> _Turn | None:
    if group_size < 1:
        raise ValueError(f"group_size must be at least 1, not {group_size}")
    if not members:
        return None
    view = tuple(members)
    if layer < num_layers:
        return _turns(view, group_size, num_layers)[layer]
    return _plain_turn(layer, view, group_size)


def _plain_turn(layer: int, members: tuple[Member, ...], group_size: int) -> _Turn:
    """Groups take turns, whatever their speed."""
    cut = _groups(members, group_size)
    group = cut[layer % len(cut)]
    start = layer // len(cut) % len(group)
    return _Turn(group, _workers(group, _load_us(members)), start, (0,) * len(group))


@lru_cache(maxsize=CACHED_VIEWS)
def _turns(members: tuple[Member, ...], group_size: int, num_layers: int) -> tuple[_Turn, ...]:
    """The turn at each layer of a model."""
    load_us = _load_us(members)
    if len(set(load_us.values())) == 1:
        return tuple(_plain_turn(layer, members, group_size) for layer in range(num_layers))
    cut = _groups(members, group_size)
    workers = [_workers(group, load_us) for group in cut]
    # So long that every worker has begun once, and its share shows.
    trials = [_take_turns(each, group_size, count=len(each)) for each in workers]
    turn_ns = [max(trial.load_us) * 1000 // len(trial.behind_us) for trial in trials]
    shares = apportion(num_layers, turn_ns)
    taken = [_take_turns(each, group_size, count=share) for each, share in zip(workers, shares, strict=True)]
    turns: list[_Turn] = []
    done = [0] * len(cut)
    for number in part_neighbours(spread(shares)):
        group, visit = cut[number], done[number]
        turns.append(_Turn(group, workers[number], visit % len(group), taken[number].behind_us[visit]))
        done[number] += 1
    return tuple(turns)


@dataclass(frozen=True, slots=True)
class _Taken:
    """What turns leave behind: for each, what every worker had still to load before it; in all, what each loaded."""

    behind_us: list[tuple[int, ...]]
    load_us: list[int]


def _take_turns(workers: tuple[Worker, ...], num_experts: int, *, count: int) -> _Taken:
    """Deal so many experts so many times; a worker that got more than its share at one turn gets less at the next."""
    taken = _Taken([], [0] * len(workers))
    behind_us = [0] * len(workers)
    for turn in range(count):
        taken.behind_us.append(tuple(behind_us))
        for index in deal(num_experts, workers, start=turn % len(workers), behind_us=behind_us):
            behind_us[index] += workers[index].load_us
            taken.load_us[index] += workers[index].load_us
        behind_us = _bounded(behind_us, workers)
    return taken


def _bounded(behind_us: list[int], workers: tuple[Worker, ...]) -> list[int]:
    """Only differences count, and none of more than the longest load: slots may have forced it on a worker, again and
    again. Among equals the start alone decides, as in the paper."""
    longest_us = max(worker.load_us for worker in workers)
    if longest_us == min(worker.load_us for worker in workers):
        return [0] * len(workers)
    least_us = min(behind_us)
    return [min(us - least_us, longest_us) for us in behind_us]


def _load_us(members: Iterable[Member]) -> dict[str, int]:
    """Node id -> microseconds one load takes; for those that are not known, the median of those that are; 1 if none
    is."""
    load_us = {member.node_id: member.load_us for member in members}
    known = sorted(us for us in load_us.values() if us > 0)
    middling = known[(len(known) - 1) // 2] if known else 1
    return {node_id: us if us > 0 else middling for node_id, us in load_us.items()}


def _workers(group: Iterable[Member], load_us: dict[str, int]) -> tuple[Worker, ...]:
    return tuple(Worker(slots=member.slots, load_us=load_us[member.node_id]) for member in group)


@lru_cache(maxsize=CACHED_VIEWS)
def _groups(members: tuple[Member, ...], group_size: int) -> tuple[tuple[Member, ...], ...]:
    cut: list[tuple[Member, ...]] = []
    for kin in _kin(members, group_size):
        num_groups = max(1, len(kin) // group_size)
        base, larger = divmod(len(kin), num_groups)
        start = 0
        for group in range(num_groups):
            size = base + (group < larger)
            cut.append(tuple(kin[start : start + size]))
            start += size
    return tuple(cut)


def _kin(members: tuple[Member, ...], group_size: int) -> list[list[Member]]:
    """Members of one speed together, the fastest first; where they do not fill a group, with the next slower ones."""
    load_us = _load_us(members)
    kin: list[list[Member]] = []
    for member in sorted(members, key=lambda member: load_us[member.node_id]):
        is_like = bool(kin) and load_us[kin[-1][-1].node_id] == load_us[member.node_id]
        if kin and (is_like or len(kin[-1]) < group_size):
            kin[-1].append(member)
        else:
            kin.append([member])
    if len(kin) > 1 and len(kin[-1]) < group_size:
        slowest = kin.pop()
        kin[-1] += slowest
    return kin


def _at_least(number: int) -> int:
    """A number of experts to deal, of which there are few."""
    return 1 << (number - 1).bit_length()


@lru_cache(maxsize=CACHED_DEALS)
def _deal_by_speed(workers: tuple[Worker, ...], num_experts: int) -> tuple[int, ...]:
    """Which worker gets expert 0, 1, and so on: always the one that would have loaded it first, among equals the one
    with more slots."""
    queue = [(worker.load_us, -worker.slots, index) for index, worker in enumerate(workers)]
    heapify(queue)
    dealt = []
    for _ in range(num_experts):
        end_us, fewer_slots, index = queue[0]
        dealt.append(index)
        heapreplace(queue, (end_us + workers[index].load_us, fewer_slots, index))
    return tuple(dealt)
