"""How work is shared among unlike workers: a layer's experts in a group, a model's layers among groups.

Pure arithmetic on whole numbers; knows no member, message or expert.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Worker:
    """Loads one expert in `load_us` microseconds and holds `slots` of them."""

    slots: int
    load_us: int


def deal(num_experts: int, workers: Sequence[Worker], *, start: int, behind_us: Sequence[int]) -> list[int]:
    """The worker that gets the first expert, the second, and so on: of those with a free slot, or of all when there is
    none, the one that will have loaded it first; among equals the one with fewest experts, then the next after `start`.
    `behind_us` is what each has to load before."""
    dealt: list[int] = []
    given = [0] * len(workers)
    rotated = [*range(start, len(workers)), *range(start)]
    for _ in range(num_experts):
        able = [index for index in rotated if given[index] < workers[index].slots] or rotated
        ends_us = [behind_us[index] + (given[index] + 1) * workers[index].load_us for index in able]
        _, _, place = min(zip(ends_us, [given[index] for index in able], range(len(able)), strict=True))
        given[able[place]] += 1
        dealt.append(able[place])
    return dealt


def apportion(num_layers: int, turn_times: Sequence[int]) -> list[int]:
    """How many layers each group serves so that the last to have served its own has done so as early as possible."""
    shares = [0] * len(turn_times)
    for _ in range(num_layers):
        first = min(range(len(shares)), key=lambda group: ((shares[group] + 1) * turn_times[group], group))
        shares[first] += 1
    return shares


def spread(shares: Sequence[int]) -> list[int]:
    """The group of each layer, given how many each group serves: a group's j-th layer of n lies in its j-th n-th of
    all layers, which the earliest deadline first always finds room for (as in Pfair scheduling)."""
    num_layers = sum(shares)
    order: list[int] = []
    given = [0] * len(shares)
    for position in range(num_layers):
        due = [
            (-(-(given[group] + 1) * num_layers // share), order[-1:] == [group], -share, group)
            for group, share in enumerate(shares)
            if given[group] < share and given[group] * num_layers // share <= position
        ]
        group = min(due)[3]
        given[group] += 1
        order.append(group)
    return order


def part_neighbours(order: Sequence[int]) -> list[int]:
    """Move as few layers as it takes for no group to serve two in a row where that can be helped. The last layer is
    followed by the first of the next token."""
    parted = list(order)
    while (move := _first_move(parted)) is not None:
        taken_from, put_before = move
        group = parted.pop(taken_from)
        parted.insert(put_before - (taken_from < put_before), group)
    return parted


def _first_move(order: list[int]) -> tuple[int, int] | None:
    """From the second of two equal neighbours to before the nearest place between two others."""
    size = len(order)
    for position, group in enumerate(order):
        if order[position - 1] != group:
            continue
        open_places = [place for place in range(size) if group not in (order[place - 1], order[place])]
        if open_places:
            return position, min(open_places, key=lambda place: _distance(place, position, size))
    return None


def _distance(one: int, other: int, size: int) -> int:
    return min((one - other) % size, (other - one) % size)
