"""Forecasts the predictor takes back. Pure."""

from odmoe_wire.messages import Span
from support.node_rig import NodeRig


def test_rollback_voids_forecasts_from_its_position_on_and_none_before() -> None:
    node = NodeRig(num_slots=4)
    for position in (5, 6, 7):
        node.forecast(0, [position], position=position)
    for _ in range(3):
        node.end_load()
    node.roll_back(6)
    assert node.held == {(0, 5)}


def test_rollback_is_for_one_sequence() -> None:
    node = NodeRig(num_slots=2)
    node.forecast(0, [1], sequence=1, position=6)
    node.forecast(0, [1, 2], sequence=2, position=6)
    node.end_load()
    node.end_load()
    node.roll_back(0, sequence=1)
    assert node.held == {(0, 1), (0, 2)}, "the other sequence wants it still"
    node.roll_back(0, sequence=2)
    assert node.held == set()
    assert node.state.num_wants == 0


def test_rollback_leaves_certain_wants_alone() -> None:
    node = NodeRig(num_slots=2)
    node.load(4, [0], span=Span(1, 6, 8))
    node.forecast(4, [0, 1], position=6)
    node.finish()
    node.roll_back(6)
    assert node.held == {(4, 0)}


def test_rollback_breaks_off_the_load_under_way_when_something_else_waits() -> None:
    node = NodeRig(num_slots=1)
    node.forecast(0, [1], position=6)
    node.forecast(4, [2], position=6)
    node.roll_back(6)
    assert node.stopping == set(), "nothing else waits"
    assert node.state.counters.loads_cancelled == 1
    node.forecast(0, [3], position=6)
    node.stop_load()
    assert node.load_keys == [(0, 3)]
    node.finish()
    assert node.held == {(0, 3)}


def test_the_right_forecast_of_a_voided_load_takes_it_over() -> None:
    node = NodeRig(num_slots=1)
    node.forecast(0, [1], position=6)
    node.roll_back(6)
    node.forecast(0, [1], position=6)
    node.finish()
    assert node.held == {(0, 1)}
    assert (node.state.counters.loads, node.state.counters.loads_broken_off) == (1, 0)


def test_forecasts_after_a_rollback_are_new_ones_and_count() -> None:
    node = NodeRig(num_slots=2)
    node.forecast(0, [1], position=6)
    node.roll_back(6)
    node.forecast(0, [2], position=6)
    node.stop_load()
    node.compute(0, [2], position=6)
    node.finish()
    assert node.outcomes() == {2: "late"}


def test_late_and_unknown_rollbacks_do_nothing() -> None:
    node = NodeRig(num_slots=2)
    node.roll_back(0, sequence=77)
    node.forecast(0, [1], position=6)
    node.cancel()
    node.roll_back(0)
    node.forecast(0, [2], sequence=2, position=3)
    node.compute(0, [2], spans=[Span(2, 3, 1)])
    node.roll_back(3, sequence=2)
    node.finish()
    assert len(node.answers) == 1, "what the gate has asked for is computed whatever the predictor takes back"
    assert node.state.num_wants == 0


def test_a_rollback_of_a_former_view_is_dropped_and_counted() -> None:
    node = NodeRig(num_slots=1)
    node.view(epoch=2)
    node.forecast(0, [1], position=6, epoch=2)
    node.roll_back(6, epoch=1)
    assert node.state.counters.stale == 1
    assert node.state.num_wants == 1
    node.roll_back(6, epoch=3)
    assert node.state.num_wants == 0, "the predictor may know the next view first"


def test_what_is_needed_first_is_still_loaded_first_after_a_rollback() -> None:
    node = NodeRig(num_slots=1)
    node.compute(0, [0], position=5)
    for layer in (1, 2):
        node.forecast(layer, [layer], position=6)
    node.forecast(0, [0], position=7)
    node.roll_back(6)
    node.forecast(0, [4], position=7)
    for layer in (2, 1):
        node.forecast(layer, [5], position=6)
    node.end_load()
    node.end_compute()
    assert node.load_keys == [(1, 5)], "position 6 was heard of before position 7"
