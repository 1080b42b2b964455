"""Placement: everything is placed, evenly, the same everywhere."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from odmoe_wire.messages import Member
from odmoe_wire.placement import group_of, groups, place

NUM_MEMBERS = st.integers(1, 20)
GROUP_SIZE = st.integers(1, 8)
LAYER = st.integers(0, 200)
EXPERTS = st.sets(st.integers(0, 511), max_size=40)


def members(number: int) -> list[Member]:
    return [Member(f"node-{i}", 2) for i in range(number)]


@given(number=NUM_MEMBERS, size=GROUP_SIZE)
def test_groups_are_a_cut_into_nearly_equal_parts(number: int, size: int) -> None:
    cut = groups(members(number), size)
    assert [member for group in cut for member in group] == members(number)
    assert len(cut) == max(1, number // size)
    sizes = {len(group) for group in cut}
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= min(size, number)


@given(number=NUM_MEMBERS, size=GROUP_SIZE, layer=LAYER, experts=EXPERTS)
def test_every_expert_goes_to_one_worker_of_the_layers_group(
    number: int, size: int, layer: int, experts: set[int]
) -> None:
    placed = place(layer, experts, members(number), size)
    group = group_of(layer, members(number), size)
    assert set(placed) == experts
    assert set(placed.values()) <= {member.node_id for member in group}
    load = Counter(placed.values())
    loads = [load[member.node_id] for member in group]
    assert max(loads) - min(loads) <= 1


@given(number=NUM_MEMBERS, size=GROUP_SIZE, layer=LAYER, experts=st.lists(st.integers(0, 63), max_size=20))
def test_order_and_repetition_of_the_set_do_not_matter(number: int, size: int, layer: int, experts: list[int]) -> None:
    placed = place(layer, experts, members(number), size)
    assert placed == place(layer, reversed(experts), members(number), size)
    assert placed == place(layer, set(experts), tuple(members(number)), size)


@given(number=NUM_MEMBERS, size=GROUP_SIZE, first=LAYER)
def test_layers_take_turns_over_all_groups(number: int, size: int, first: int) -> None:
    num_groups = len(groups(members(number), size))
    served = [group_of(layer, members(number), size) for layer in range(first, first + num_groups)]
    assert len(set(served)) == num_groups
    assert group_of(first + num_groups, members(number), size) == served[0]


@given(number=NUM_MEMBERS, size=GROUP_SIZE, first=LAYER, num_experts=st.integers(1, 10))
def test_uneven_counts_even_out_over_the_layers_of_a_group(
    number: int, size: int, first: int, num_experts: int
) -> None:
    num_groups = len(groups(members(number), size))
    group = group_of(first, members(number), size)
    load: Counter[str] = Counter()
    for turn in range(len(group)):
        load.update(place(first + turn * num_groups, range(num_experts), members(number), size).values())
    assert {load[member.node_id] for member in group} == {num_experts}


def test_the_papers_example() -> None:
    """Eight workers in groups of two: layers 0 and 4 share a group, experts are dealt in ascending order."""
    eight = members(8)
    assert place(0, {6, 3}, eight, 2) == {3: "node-0", 6: "node-1"}
    assert place(1, {6, 3}, eight, 2) == {3: "node-2", 6: "node-3"}
    assert place(4, {6, 3}, eight, 2) == {3: "node-1", 6: "node-0"}


def test_no_members_no_places() -> None:
    assert place(3, {1, 2}, [], 2) == {}
    assert group_of(3, [], 2) == ()


def test_a_group_of_none_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="group_size"):
        place(0, {1}, members(2), 0)
