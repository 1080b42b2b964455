"""Forecasts of several sequences share what they both need: one node, one load; a sequence alone is dealt as ever."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from odmoe_server.cluster.peers import ClusterConfig
from odmoe_wire.messages import Member, Span
from odmoe_wire.placement import place
from odmoe_wire.sharing import MAX_DEALS, Sharing
from support.verifying import Verifying

LAYERS, GROUP = 6, 2
FORECASTS = st.lists(st.sets(st.integers(0, 7), min_size=1, max_size=4), min_size=1, max_size=12)


def members(number: int = 4) -> list[Member]:
    return [Member(f"n{index}", 1) for index in range(number)]


def deal(sharing: Sharing, sequence: int, position: int, experts: set[int], layer: int = 1) -> dict[int, str]:
    return sharing.deal(Span(sequence, position), layer, experts, members(), group_size=GROUP, num_layers=LAYERS)


@settings(deadline=None)
@given(forecasts=FORECASTS, layer=st.integers(0, LAYERS - 1))
def test_a_sequence_alone_is_dealt_as_by_placement(forecasts: list[set[int]], layer: int) -> None:
    sharing = Sharing()
    for position, experts in enumerate(forecasts):
        assert deal(sharing, 1, position, experts, layer) == place(layer, experts, members(), GROUP, LAYERS)


@settings(deadline=None)
@given(
    rounds=st.lists(st.lists(st.sets(st.integers(0, 7), min_size=2, max_size=2), min_size=3, max_size=3), max_size=6)
)
def test_an_expert_that_sequences_of_a_round_need_has_one_node(rounds: list[list[set[int]]]) -> None:
    """And what is not shared is dealt as evenly as that allows: two experts of a forecast meet only where others have
    put them together."""
    sharing = Sharing()
    for position, forecasts in enumerate(rounds):
        where: dict[int, str] = {}
        for sequence, experts in enumerate(forecasts):
            known = {expert: where[expert] for expert in experts & where.keys()}
            dealt = deal(sharing, sequence, position, experts)
            assert set(dealt) == experts
            assert sharing.where(Span(sequence, position), 1) == dealt
            assert known.items() <= dealt.items()
            if sequence == len(forecasts) - 1 and len(known) < 2:
                assert len(set(dealt.values())) == 2
            where |= dealt


def test_what_was_dealt_before_a_sequences_own_last_turn_is_past() -> None:
    sharing = Sharing()
    other = deal(sharing, 1, 10, {3, 5})
    assert deal(sharing, 2, 50, {0, 3}) == {0: other[5], 3: other[3]}
    alone = deal(sharing, 2, 51, {5, 7})
    assert alone == place(1, {5, 7}, members(), GROUP, LAYERS), "the other one is over"
    assert alone[5] != other[5], "or this could not fail"


def test_a_forecast_in_place_of_another_leaves_experts_where_they_are_loading() -> None:
    sharing = Sharing()
    before = deal(sharing, 1, 10, {3, 5})
    after = deal(sharing, 1, 10, {5, 7})
    assert after == {5: before[5], 7: before[3]}
    assert after != place(1, {5, 7}, members(), GROUP, LAYERS), "or this could not fail"


def test_another_view_begins_anew_and_memory_is_bounded() -> None:
    sharing = Sharing()
    deal(sharing, 1, 10, {3, 5})
    sharing.clear()
    assert sharing.where(Span(1, 10), 1) == {}
    assert sharing.deal(Span(1, 10), 1, {3}, [], group_size=GROUP, num_layers=LAYERS) == {}
    for position in range(MAX_DEALS + 1):
        deal(sharing, 1, position, {3, 5})
    assert sharing.where(Span(1, 0), 1) == {}
    assert sharing.where(Span(1, 1), 1) != {}


@pytest.mark.parametrize("num_sequences", [1, 2, 5])
def test_no_expert_is_loaded_twice_for_sequences_that_step_together(num_sequences: int) -> None:
    config = ClusterConfig(
        store_digest="d", package_version="1", num_layers=LAYERS, num_experts=8, group_size=GROUP, top_k=2
    )
    cluster = Verifying(config, num_nodes=4, num_slots=64, wrong=0.0, seed=1)
    for position in range(5):
        blocks = {sequence: (position + 10 * sequence, [1]) for sequence in range(1, num_sequences + 1)}
        for sequence, (at, _) in blocks.items():
            cluster.forecast(sequence, at, 1)
        cluster.settle()
        cluster.step(blocks)
    assert cluster.outcomes == {"hit"}
    needed = sum(len(call.counts) for call in cluster.called)
    assert sum(node.state.counters.loads for node in cluster.nodes.values()) == needed
