"""The node's core, case by case."""

import pytest

from odmoe_wire.messages import Loaded, Span
from support.node_rig import SLOT_BYTES, NodeRig


def test_a_forecast_expert_is_loaded_computed_and_leaves_at_once() -> None:
    node = NodeRig(num_slots=2)
    node.forecast(0, [3])
    assert node.load_keys == [(0, 3)]
    assert node.state.accounted_bytes == SLOT_BYTES
    node.end_load()
    assert node.told == [Loaded(layer=0, expert=3, load_s=0.5, load_bytes=SLOT_BYTES, on_demand=False)]
    request_id = node.compute(0, [3])
    node.end_compute()
    assert [answer.request_id for answer in node.answers] == [request_id]
    assert node.outcomes() == {3: "hit"}
    assert node.held == set()
    assert node.state.accounted_bytes == 0


def test_a_compute_finds_its_experts_ready_loading_and_missing() -> None:
    node = NodeRig(num_slots=3)
    node.forecast(0, [0, 1])
    node.end_load()
    node.compute(0, [2, 1, 0])
    assert node.load_keys == [(0, 1)]
    node.end_load()
    assert node.load_keys == [(0, 2)]
    node.finish()
    assert node.outcomes() == {0: "hit", 1: "late", 2: "miss"}
    assert [told.on_demand for told in node.told if isinstance(told, Loaded)] == [False, False, True]


def test_a_queued_forecast_that_a_compute_takes_over_is_a_miss_but_was_asked_for() -> None:
    node = NodeRig(num_slots=1)
    node.forecast(0, [0, 1])
    node.compute(0, [0, 1])
    node.finish()
    assert node.outcomes() == {0: "late", 1: "miss"}
    assert [told.on_demand for told in node.told if isinstance(told, Loaded)] == [False, False]
    assert node.state.counters.loads == 2


def test_timings_say_how_long_each_expert_was_waited_for() -> None:
    node = NodeRig(num_slots=1)
    node.compute(0, [0])
    node.now = 2.0
    node.finish()
    timing = node.answers[0].timings[0]  # type: ignore[union-attr]
    assert timing.wait_s == pytest.approx(2.0, abs=0.01)
    assert timing.compute_s == 0.25


def test_one_slot_serves_two_experts_of_one_compute_one_after_the_other() -> None:
    node = NodeRig(num_slots=1)
    node.compute(0, [4, 7])
    assert node.load_keys == [(0, 4)]
    node.end_load()
    assert node.loading == []
    node.end_compute()
    assert node.load_keys == [(0, 7)]
    node.finish()
    assert len(node.answers) == 1
    assert node.held == set()


def test_the_next_expert_loads_while_this_one_computes_when_there_are_two_slots() -> None:
    node = NodeRig(num_slots=2)
    node.compute(0, [4, 7])
    node.end_load()
    assert [order.key for order in node.computing] == [(0, 4)]
    assert node.load_keys == [(0, 7)]


def test_what_a_later_token_wants_yields_its_slot_to_what_this_token_needs() -> None:
    """A shadow that runs ahead wants experts of the next token while this token's layers are still to come."""
    node = NodeRig(num_slots=1)
    node.forecast(0, [1], position=5)
    node.forecast(1, [2], position=5)
    node.forecast(0, [1], position=6)
    node.end_load()
    node.compute(0, [1], position=5)
    node.end_compute()
    assert node.load_keys == [(1, 2)], "expert 1 is wanted again, but later"
    node.end_load()
    node.compute(1, [2], position=5)
    node.end_compute()
    assert node.load_keys == [(0, 1)]
    node.end_load()
    node.forecast(1, [3], position=6)
    assert node.load_keys == [], "what is needed later waits"


def test_forecasts_ahead_are_replaced_when_the_guess_was_wrong_and_gone_after_the_end() -> None:
    node = NodeRig(num_slots=4)
    node.forecast(0, [1], position=6)
    node.forecast(1, [2], position=6)
    node.end_load()
    node.forecast(0, [5], position=6)
    node.finish()
    assert node.held == {(0, 5), (1, 2)}
    node.cancel(1)
    assert node.held == set()
    node.forecast(0, [3], position=7)
    assert node.state.num_wants == 0


def test_an_expert_in_a_slot_is_never_loaded_again() -> None:
    node = NodeRig(num_slots=3)
    node.forecast(0, [1])
    node.forecast(0, [1], sequence=2)
    node.forecast(0, [1])
    node.end_load()
    assert node.loading == []
    node.compute(0, [1])
    node.end_compute()
    assert node.held == {(0, 1)}, "the other sequence still wants it"
    node.compute(0, [1], spans=[Span(2, 0, 1)])
    node.finish()
    assert node.state.counters.loads == 1
    assert node.held == set()


def test_two_computes_share_a_slot() -> None:
    node = NodeRig(num_slots=1)
    node.compute(0, [1])
    node.compute(0, [1], spans=[Span(2, 0, 1)])
    node.end_load()
    assert len(node.computing) == 1
    node.finish()
    assert [answer.request_id for answer in node.answers] == [0, 1]
    assert node.state.counters.loads == 1


def test_wants_not_begun_are_cancelled_without_cost() -> None:
    node = NodeRig(num_slots=1)
    node.forecast(0, [0])
    node.forecast(1, [1, 2])
    node.compute(1, [5])
    assert node.state.counters.loads_cancelled == 2
    assert node.end_load() == (0, 0)
    assert node.load_keys == [(1, 5)]
    node.finish()
    assert node.state.counters.loads == 2
    assert node.state.counters.loads_unused == 1


def test_an_unwanted_load_in_flight_goes_on_while_nothing_else_waits_and_is_freed_when_it_ends() -> None:
    node = NodeRig(num_slots=1)
    node.forecast(0, [0])
    node.release(0)
    assert node.held == {(0, 0)}
    assert node.stopping == set()
    node.end_load()
    assert node.held == set()
    assert node.told == [], "it did not come to rest"
    assert node.state.counters.loads_unused == 1


def test_an_unwanted_load_in_flight_can_be_wanted_again() -> None:
    node = NodeRig(num_slots=2)
    node.forecast(0, [0])
    node.release(0)
    node.compute(0, [0], position=1)
    assert node.load_keys == [(0, 0)]
    node.finish()
    assert node.outcomes() == {0: "late"}
    assert node.state.counters.loads == 1


def test_a_wrong_forecast_leaves_its_slot_when_the_gate_speaks() -> None:
    node = NodeRig(num_slots=2)
    node.forecast(0, [0, 1])
    node.end_load()
    node.end_load()
    node.compute(0, [0])
    assert node.held == {(0, 0)}
    node.finish()
    assert node.held == set()


def test_release_voids_this_layer_and_those_before_but_not_those_after() -> None:
    node = NodeRig(num_slots=3)
    for layer in (0, 1, 2):
        node.forecast(layer, [0])
    for _ in range(3):
        node.end_load()
    node.release(1)
    assert node.held == {(2, 0)}


def test_forecasts_for_the_next_position_survive_the_end_of_this_one() -> None:
    node = NodeRig(num_slots=2)
    node.forecast(0, [0], position=5)
    node.forecast(0, [1], position=6)
    node.end_load()
    node.end_load()
    node.release(9, position=5)
    assert node.held == {(0, 1)}


def test_forecasts_later_than_the_horizon_are_dropped_and_counted() -> None:
    node = NodeRig(num_slots=2)
    node.compute(3, [0], position=5)
    node.finish()
    node.forecast(3, [1], position=5)
    node.forecast(7, [1], position=4)
    assert node.loading == []
    assert node.state.counters.late_forecasts == 2
    node.forecast(4, [1], position=5)
    node.forecast(0, [2], position=6)
    assert node.load_keys == [(4, 1)]
    assert node.state.num_wants == 2


def test_a_span_of_several_tokens_voids_forecasts_for_each_of_them() -> None:
    node = NodeRig(num_slots=3)
    for position in (10, 11, 12):
        node.forecast(2, [position - 10], position=position)
    for _ in range(3):
        node.end_load()
    node.compute(2, [1], spans=[Span(1, 10, 2)])
    node.finish()
    assert node.held == {(2, 2)}


def test_a_new_forecast_for_the_same_span_and_layer_replaces_the_former() -> None:
    node = NodeRig(num_slots=2)
    node.forecast(0, [0, 1])
    node.end_load()
    node.end_load()
    node.forecast(0, [1, 2])
    assert node.load_keys == [(0, 2)]
    assert node.held == {(0, 1), (0, 2)}


def test_loads_start_by_need_then_certainty_then_age_of_the_span_then_layer() -> None:
    node = NodeRig(num_slots=8)
    node.forecast(0, [9])  # keeps the loader busy
    node.forecast(5, [0], sequence=2)
    node.forecast(2, [1], sequence=1, position=3)
    node.forecast(1, [2], sequence=2)
    node.load(7, [3], span=Span(3, 0, 4))
    node.compute(0, [4], spans=[Span(4, 0, 1)])
    order = [node.end_load() for _ in range(6)]
    assert order == [(0, 9), (0, 4), (7, 3), (1, 2), (5, 0), (2, 1)]


def test_a_need_takes_the_slot_of_the_forecast_needed_last() -> None:
    node = NodeRig(num_slots=2)
    node.forecast(3, [0])
    node.forecast(8, [0])
    node.end_load()
    node.end_load()
    node.compute(1, [5])
    assert node.held == {(3, 0), (1, 5)}
    node.finish()
    assert node.held == {(3, 0), (8, 0)}, "the forecast that gave way is loaded again"


def test_a_need_takes_the_slot_of_a_certain_load_only_when_no_forecast_is_there() -> None:
    node = NodeRig(num_slots=2)
    node.load(3, [0])
    node.forecast(2, [0])
    node.end_load()
    node.end_load()
    node.compute(1, [5], spans=[Span(9, 0, 1)])
    assert node.held == {(3, 0), (1, 5)}
    node.compute(1, [6], spans=[Span(9, 0, 1)])
    node.end_load()
    assert node.held == {(1, 6), (1, 5)}
    node.finish()
    assert node.held == {(3, 0), (2, 0)}


def test_certain_loads_outlive_computes_that_do_not_name_them() -> None:
    node = NodeRig(num_slots=4)
    span = Span(1, 0, 16)
    node.load(0, [0, 1], span=span)
    node.load(1, [2], span=span)
    for _ in range(3):
        node.end_load()
    node.compute(0, [0], spans=[span])
    node.finish()
    assert node.held == {(0, 1), (1, 2)}
    node.compute(0, [1], spans=[span])
    node.finish()
    node.compute(1, [3], spans=[span])
    node.finish()
    assert node.held == {(1, 2)}
    node.compute(2, [3], spans=[span])
    assert (1, 2) not in node.held, "its layer is behind"


def test_a_certain_load_of_a_later_part_of_the_prompt_survives_an_earlier_part_at_a_later_layer() -> None:
    node = NodeRig(num_slots=2)
    node.load(4, [0], span=Span(1, 64, 64))
    node.end_load()
    node.compute(6, [1], spans=[Span(1, 0, 64)])
    node.finish()
    assert node.held == {(4, 0)}


def test_release_frees_certain_loads_of_its_layer_too() -> None:
    node = NodeRig(num_slots=2)
    node.load(4, [0])
    node.end_load()
    node.release(3)
    assert node.held == {(4, 0)}
    node.release(4)
    assert node.held == set()


def test_a_certain_load_for_a_whole_prompt_lasts_until_its_last_part_is_computed() -> None:
    node = NodeRig(num_slots=2)
    node.load(4, [0], span=Span(1, 0, 64))
    node.load(4, [0], span=Span(1, 0, 128))
    node.compute(4, [0], spans=[Span(1, 0, 64)])
    node.finish()
    assert node.held == {(4, 0)}
    node.compute(4, [0], spans=[Span(1, 64, 64)])
    node.finish()
    assert node.held == set()
    assert node.state.counters.loads == 1


def test_a_certain_load_that_was_computed_elsewhere_ends_with_the_next_position_at_its_layer() -> None:
    node = NodeRig(num_slots=2)
    node.load(4, [0], span=Span(1, 0, 8))
    node.end_load()
    node.compute(3, [1], position=8)
    node.finish()
    assert node.held == {(4, 0)}, "another part of the prompt may be ahead of it"
    node.compute(4, [1], position=8)
    node.finish()
    assert node.held == set()


def test_going_back_to_the_first_part_of_a_prompt_does_not_take_the_horizon_back() -> None:
    node = NodeRig(num_slots=2)
    node.compute(3, [0], spans=[Span(1, 64, 64)])
    node.compute(4, [0], spans=[Span(1, 0, 64)])
    node.finish()
    node.forecast(3, [5], position=100)
    assert node.loading == []
    assert node.state.counters.late_forecasts == 1
