"""Placement over nodes of unlike speed and room: everything is placed, in proportion, the same everywhere.

The times are those of `virtual_decode`, where nothing but loads and computes takes any.
"""

from collections import Counter
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from odmoe_wire.messages import Member
from odmoe_wire.placement import deal_prompt, group_of, groups, place
from support.virtual_decode import token_us

SLOTS = st.integers(1, 6)
LOAD_US = st.one_of(st.just(0), st.sampled_from([1000, 1300, 2000, 2500, 9000]), st.integers(1, 50_000))
MEMBERS = st.lists(st.tuples(SLOTS, LOAD_US), min_size=1, max_size=14).map(
    lambda kinds: [Member(f"n{index:02}", slots, load_us) for index, (slots, load_us) in enumerate(kinds)]
)
GROUP_SIZE = st.integers(1, 6)
NUM_LAYERS = st.integers(1, 40)


def nodes(*load_us: int, slots: int = 1) -> list[Member]:
    return [Member(f"n{index}", slots, us) for index, us in enumerate(load_us)]


def told_nothing(members: Sequence[Member]) -> list[Member]:
    return [msgspec.structs.replace(member, load_us=0) for member in members]


def served(members: Sequence[Member], group_size: int, num_layers: int) -> list[tuple[Member, ...]]:
    return [group_of(layer, members, group_size, num_layers) for layer in range(num_layers)]


def experts_of_a_token(members: Sequence[Member], top_k: int, num_layers: int) -> Counter[str]:
    total: Counter[str] = Counter()
    for layer in range(num_layers):
        total.update(place(layer, range(top_k), members, top_k, num_layers).values())
    return total


@settings(deadline=None)  # a busy machine is no fault
@given(members=MEMBERS, size=GROUP_SIZE)
def test_every_member_is_in_one_group_and_no_group_is_too_small(members: list[Member], size: int) -> None:
    cut = groups(members, size)
    assert Counter(member for group in cut for member in group) == Counter(members)
    assert all(min(size, len(members)) <= len(group) for group in cut)
    if len(members) >= size:
        assert all(len(group) < 3 * size for group in cut), "no larger than it takes to keep kinds together"


@settings(deadline=None)  # a busy machine is no fault
@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=4), size=st.integers(1, 3))
def test_no_fast_node_shares_a_group_with_a_slow_one_if_each_kind_fills_a_group(counts: list[int], size: int) -> None:
    mixed = nodes(*(1000 * (kind + 1) for kind, count in enumerate(counts) for _ in range(count * size)))
    for group in groups(mixed[::2] + mixed[1::2], size):
        assert len({member.load_us for member in group}) == 1


@settings(deadline=None)  # a busy machine is no fault
@given(
    members=MEMBERS,
    size=GROUP_SIZE,
    num_layers=NUM_LAYERS,
    experts=st.sets(st.integers(0, 63), max_size=24),
    data=st.data(),
)
def test_every_expert_goes_to_one_worker_of_the_layers_group(
    members: list[Member], size: int, num_layers: int, experts: set[int], data: st.DataObject
) -> None:
    layer = data.draw(st.integers(0, num_layers - 1))
    placed = place(layer, experts, members, size, num_layers)
    group = group_of(layer, members, size, num_layers)
    assert group in groups(members, size)
    assert set(placed) == experts
    assert set(placed.values()) <= {member.node_id for member in group}
    load = Counter(placed.values())
    full = [member for member in group if load[member.node_id] > member.slots]
    assert not full or all(load[member.node_id] >= member.slots for member in group), "a free slot was left"


@settings(deadline=None)  # a busy machine is no fault
@given(members=MEMBERS, size=GROUP_SIZE, num_layers=NUM_LAYERS, experts=st.lists(st.integers(0, 63), max_size=12))
def test_all_roles_agree(members: list[Member], size: int, num_layers: int, experts: list[int]) -> None:
    """Whoever got the view, in whatever order the experts are named, and whatever else was asked before."""
    received = msgspec.msgpack.decode(msgspec.msgpack.encode(members), type=list[Member])
    for layer in range(num_layers):
        placed = place(layer, experts, members, size, num_layers)
        assert placed == place(layer, reversed(experts), tuple(received), size, num_layers)


@settings(deadline=None)  # a busy machine is no fault
@given(
    number=st.integers(1, 20),
    size=GROUP_SIZE,
    load_us=st.integers(0, 10_000),
    num_layers=NUM_LAYERS,
    experts=st.sets(st.integers(0, 63), max_size=20),
)
def test_equal_members_are_placed_as_in_the_paper(
    number: int, size: int, load_us: int, num_layers: int, experts: set[int]
) -> None:
    members = [Member(f"n{index:02}", 2, load_us) for index in range(number)]
    num_groups = max(1, number // size)
    for layer in range(num_layers):
        group = group_of(layer, members, size, num_layers)
        assert group == groups(members, size)[layer % num_groups]
        turn = layer // num_groups
        expected = {expert: group[(turn + i) % len(group)].node_id for i, expert in enumerate(sorted(experts))}
        assert place(layer, experts, members, size, num_layers) == expected


@settings(deadline=None)  # a busy machine is no fault
@given(fast=st.integers(1, 4), slow=st.integers(1, 4), ratio=st.integers(2, 6), size=GROUP_SIZE, num_layers=NUM_LAYERS)
def test_a_node_loads_in_proportion_to_its_speed_within_a_layer(
    fast: int, slow: int, ratio: int, size: int, num_layers: int
) -> None:
    members = nodes(*[1000] * (fast * size), *[1000 * ratio] * (slow * size))
    total = experts_of_a_token(members, size, num_layers)
    busy_us = {member.node_id: total[member.node_id] * member.load_us for member in members}
    for member in members:
        assert max(busy_us.values()) <= busy_us[member.node_id] + member.load_us


def test_within_a_mixed_group_the_slower_worker_loads_less() -> None:
    """One group of three, two experts a layer: the slower one gets every fifth, as its link allows."""
    members = nodes(1000, 1000, 2000, slots=2)
    assert experts_of_a_token(members, 2, 50) == {"n0": 40, "n1": 40, "n2": 20}


def test_a_node_with_one_slot_gets_no_second_expert_while_another_has_room() -> None:
    members = [Member("fast", 1, 1000), Member("slow", 3, 5000)]
    assert Counter(place(0, range(4), members, 4, 8).values()) == {"fast": 1, "slow": 3}
    assert Counter(place(0, range(9), members, 4, 8).values()) == {"fast": 6, "slow": 3}, "then speed decides"


@settings(deadline=None)  # a busy machine is no fault
@given(members=MEMBERS, size=GROUP_SIZE, num_layers=st.integers(2, 40))
def test_no_group_serves_two_layers_in_a_row_where_that_can_be_helped(
    members: list[Member], size: int, num_layers: int
) -> None:
    if len({member.load_us for member in members if member.load_us}) <= 1:
        return  # equal members take turns as in the paper, wherever a token ends
    order = served(members, size, num_layers)
    for group, share in Counter(order).items():
        in_a_row = sum(order[layer - 1] == order[layer] == group for layer in range(num_layers))
        others = num_layers - share
        assert in_a_row == (max(0, share - others) if others else num_layers)


def test_the_last_layer_and_the_next_tokens_first_are_parted() -> None:
    order = [group[0].node_id for group in served(nodes(1000, 1900, 2000), 1, 4)]
    assert order == ["n0", "n1", "n0", "n2"]


def test_a_node_whose_speed_is_not_known_counts_as_a_middling_one() -> None:
    known = [Member("a", 1, 1000), Member("b", 1, 2000), Member("c", 1, 5000), Member("x", 1, 0)]
    guessed = [*known[:3], Member("x", 1, 2000)]
    for layer in range(12):
        assert place(layer, {1}, known, 1, 12) == place(layer, {1}, guessed, 1, 12)


def test_a_hopelessly_slow_node_is_left_out() -> None:
    order = served(nodes(1000, 1000, 1000, 1000, 90_000, 90_000), 2, 24)
    assert {member.load_us for group in order for member in group} == {1000}


@pytest.mark.parametrize("size", [1, 2, 7])
def test_one_node_serves_all_and_none_serves_nothing(size: int) -> None:
    assert place(3, {1, 2}, nodes(700), size, 5) == {1: "n0", 2: "n0"}
    assert place(3, {1, 2}, [], size, 5) == {}
    assert deal_prompt({1, 2}, []) == {}


# ---------------------------------------------------------------------------------------------------------- prompts


@settings(deadline=None)  # a busy machine is no fault
@given(members=MEMBERS, experts=st.sets(st.integers(0, 255), max_size=40))
def test_a_prompts_expert_goes_to_the_same_node_whatever_else_is_needed(
    members: list[Member], experts: set[int]
) -> None:
    dealt = deal_prompt(range(256), members)
    assert deal_prompt(experts, members) == {expert: dealt[expert] for expert in experts}


@settings(deadline=None)  # a busy machine is no fault
@given(members=MEMBERS.filter(lambda members: all(member.load_us for member in members)), number=st.integers(1, 256))
def test_a_prompts_experts_are_dealt_in_proportion_to_speed(members: list[Member], number: int) -> None:
    load = Counter(deal_prompt(range(number), members).values())
    ends_us = {member.node_id: load[member.node_id] * member.load_us for member in members}
    for member in members:
        assert max(ends_us.values()) <= ends_us[member.node_id] + member.load_us


def test_equal_members_get_a_prompts_experts_in_turn_and_the_roomier_get_what_is_left_over() -> None:
    assert deal_prompt(range(4), nodes(5, 5, 5)) == {0: "n0", 1: "n1", 2: "n2", 3: "n0"}
    roomier = [Member("a", 1, 5), Member("b", 3, 5), Member("c", 1, 5)]
    assert Counter(deal_prompt(range(4), roomier).values()) == {"a": 1, "b": 2, "c": 1}


# ------------------------------------------------------------------------------------------------------------ times

# Eight nodes, every other one with half the link; top-2; a load of the faster takes 4.4 times a layer, as the paper's.
HALF_SLOW = [4400, 8800] * 4
LAYERS, MAIN_US, EXPERT_US = 24, 500, 500


@pytest.mark.parametrize("slots", [1, 2])
def test_a_set_of_fast_and_half_as_fast_nodes_decodes_as_fast_as_its_links_allow(slots: int) -> None:
    """Told nothing, every group waits for its slower node and serves a quarter of the layers: 6 slow cycles a token.
    Weighted, the fast groups serve 8 and the slow ones 4: the links carry 3 layers where they carried 2. With one slot
    a cycle is a load and a compute, with two a load."""
    members = nodes(*HALF_SLOW, slots=slots)
    compute_us = EXPERT_US if slots == 1 else 0
    timing = {"top_k": 2, "num_layers": LAYERS, "main_us": MAIN_US, "expert_us": EXPERT_US}
    plain_us = token_us(members, told=told_nothing(members), **timing)
    weighted_us = token_us(members, told=members, **timing)
    assert plain_us == pytest.approx(6 * (8800 + compute_us), rel=0.01)
    assert weighted_us == pytest.approx(8 * (4400 + compute_us), rel=0.01)
    assert plain_us / weighted_us == pytest.approx({1: 1.42, 2: 1.5}[slots], abs=0.01)


@pytest.mark.parametrize("load_us", [[1000] * 7 + [3000], [1000, 1300, 1900, 2400, 3000, 3800], [1000, 2000, 4000]])
def test_weighing_does_no_harm_where_loads_are_hidden_or_not(load_us: list[int]) -> None:
    for times in (1, 2, 4, 8):
        members = nodes(*(us * times for us in load_us))
        timing = {"top_k": 2, "num_layers": LAYERS, "main_us": MAIN_US, "expert_us": EXPERT_US}
        assert token_us(members, told=members, **timing) <= token_us(members, told=told_nothing(members), **timing)
