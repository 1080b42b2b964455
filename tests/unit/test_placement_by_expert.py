"""Placing "expert": an expert has its node whatever else is needed, evenly or in proportion, the same in every role."""

from collections import Counter

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from odmoe_server.cluster.dispatch import assign
from odmoe_server.cluster.events import LayerCall, Send
from odmoe_server.cluster.peers import ClusterConfig, Peers
from odmoe_wire.homes import homes, placed
from odmoe_wire.messages import Hello, Member, Span, View
from odmoe_wire.placement import deal_prompt, group_of, groups, place

MEMBERS = st.lists(
    st.tuples(st.integers(1, 4), st.sampled_from([0, 1000, 1300, 2000, 9000])), min_size=1, max_size=12
).map(lambda kinds: [Member(f"n{index:02}", slots, load_us) for index, (slots, load_us) in enumerate(kinds)])
GROUP_SIZE = st.integers(1, 5)
LAYER = st.integers(0, 30)
EXPERTS = st.sets(st.integers(0, 300), max_size=20)


def equal(number: int) -> list[Member]:
    return [Member(f"n{index:02}", 1) for index in range(number)]


def by_expert(layer: int, experts: set[int], members: list[Member], size: int, num_layers: int = 0) -> dict[int, str]:
    return place(layer, experts, members, size, num_layers, placing="expert")


@settings(deadline=None)
@given(
    members=MEMBERS, size=GROUP_SIZE, layer=LAYER, experts=EXPERTS, more=EXPERTS, num_layers=st.sampled_from([0, 32])
)
def test_an_experts_node_is_of_the_layers_group_and_does_not_depend_on_the_others(
    members: list[Member], size: int, layer: int, experts: set[int], more: set[int], num_layers: int
) -> None:
    few = by_expert(layer, experts, members, size, num_layers)
    many = by_expert(layer, experts | more, members, size, num_layers)
    assert set(few) == experts
    assert few == {expert: many[expert] for expert in experts}
    assert set(many.values()) <= {member.node_id for member in group_of(layer, members, size, num_layers)}


@settings(deadline=None)
@given(members=MEMBERS, size=GROUP_SIZE, experts=EXPERTS)
def test_all_roles_agree(members: list[Member], size: int, experts: set[int]) -> None:
    """Whoever got the view, in whatever order the experts are named."""
    received = msgspec.msgpack.decode(msgspec.msgpack.encode(members), type=list[Member])
    for layer in range(12):
        here = by_expert(layer, experts, members, size, 12)
        there = placed(
            layer,
            sorted(experts, reverse=True),
            tuple(received),
            size,
            mode="on-demand",
            num_layers=12,
            placing="expert",
        )
        assert here == there


@given(number=st.integers(1, 16), size=GROUP_SIZE, layer=LAYER, num_experts=st.integers(1, 40))
def test_equal_nodes_have_equally_many_experts_of_a_layer(number: int, size: int, layer: int, num_experts: int) -> None:
    load = Counter(by_expert(layer, set(range(num_experts)), equal(number), size).values())
    group = group_of(layer, equal(number), size)
    counts = [load[member.node_id] for member in group]
    assert max(counts) - min(counts) <= 1


@given(number=st.integers(1, 16), size=GROUP_SIZE, first=LAYER, expert=st.integers(0, 40))
def test_an_expert_goes_round_its_group_from_layer_to_layer(number: int, size: int, first: int, expert: int) -> None:
    """So that no node is always the busy one, if some experts are asked for more than others."""
    members = equal(number)
    num_groups = len(groups(members, size))
    group = group_of(first, members, size)
    met = [by_expert(first + turn * num_groups, {expert}, members, size)[expert] for turn in range(len(group))]
    assert Counter(met) == Counter(member.node_id for member in group)


def test_unlike_nodes_of_a_group_have_experts_in_proportion_to_their_speed() -> None:
    members = [Member("fast", 1, 1000), Member("slow", 1, 3000)]
    for layer in range(4):
        load = Counter(by_expert(layer, set(range(64)), members, 2, 4).values())
        assert load["fast"] in (47, 48, 49), "three quarters"


def test_slots_that_are_caches_are_homes_still() -> None:
    assert placed(1, [2, 5], equal(4), 2, mode="lru", placing="expert") == homes(1, [2, 5], equal(4))
    assert place(3, {1}, [], 2, placing="expert") == {}
    assert place(3, set(), equal(3), 2, placing="expert") == {}


def config(**changes: object) -> ClusterConfig:
    fields = {"store_digest": "d1", "package_version": "1", "num_layers": 12, "num_experts": 8, "group_size": 2}
    return ClusterConfig(**{**fields, "placing": "expert", **changes})  # type: ignore[arg-type]


def call(layer: int, experts: set[int], *, is_prompt: bool = False) -> LayerCall:
    spans = tuple(Span(1, position) for position in range(4))
    return LayerCall(call_id=1, spans=spans, layer=layer, counts=dict.fromkeys(experts, 1), is_prompt=is_prompt)


@given(members=MEMBERS, layer=st.integers(0, 11), needed=st.sets(st.integers(0, 7), min_size=1), data=st.data())
def test_forecast_and_unforeseen_experts_alike_are_computed_where_placement_has_them(
    members: list[Member], layer: int, needed: set[int], data: st.DataObject
) -> None:
    predicted = data.draw(st.frozensets(st.integers(0, 7), min_size=1))
    assert assign(call(layer, needed), [predicted], members, config()) == by_expert(layer, needed, members, 2, 12)


def test_many_experts_without_any_forecast_and_prompts_are_dealt_round_all_nodes() -> None:
    members, all_experts = equal(8), set(range(8))
    for step in (call(1, all_experts), call(1, all_experts, is_prompt=True)):
        assert assign(step, [], members, config()) == deal_prompt(all_experts, members)
    assert assign(call(1, {3, 6}), [], members, config()) == by_expert(1, {3, 6}, members, 2, 12)


@pytest.mark.parametrize("placing", ["span", "expert"])
def test_the_view_says_how_experts_are_placed(placing: str) -> None:
    peers = Peers(config=config(placing=placing))
    hello = Hello(
        role="node", peer_id="n0", incarnation=1, package_version="1", store_digest="d1", slots=1, budget_bytes=1
    )
    sent = [action.message for action in peers.admit("n0", hello, 0.0) if isinstance(action, Send)]
    assert [message.placing for message in sent if isinstance(message, View)] == [placing]
