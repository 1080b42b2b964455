"""Loads in flight that are broken off: which, for what, and that it comes to an end. Pure."""

import pytest

from odmoe_node.events import BreakOff, ServerLost, StartLoad
from odmoe_node.loader import NEAR_THE_END
from odmoe_wire.messages import Loaded, Span
from support.node_rig import NodeRig


def one_load_known(*, num_slots: int, load_s: float = 1.0) -> NodeRig:
    """A node that has seen how long a load takes, and is empty again."""
    node = NodeRig(num_slots=num_slots)
    node.compute(0, [0], spans=[Span(99, 0, 1)])
    node.end_load(load_s)
    node.finish()
    return node


def test_a_load_the_gate_shows_to_be_wrong_is_broken_off_for_the_right_one() -> None:
    node = NodeRig(num_slots=1)
    node.forecast(0, [3])
    node.compute(0, [5])
    assert node.actions == [BreakOff(0)]
    assert node.stop_load() == (0, 3)
    assert node.load_keys == [(0, 5)]
    node.finish()
    assert node.outcomes() == {5: "miss"}
    assert node.held == set()
    counters = node.state.counters
    assert (counters.loads, counters.loads_broken_off, counters.loads_unused) == (1, 1, 0)
    assert (counters.load_s, counters.broken_off_s) == (0.5, 0.125)


def test_a_released_load_is_broken_off_for_the_next_forecast() -> None:
    node = NodeRig(num_slots=1)
    node.forecast(0, [3])
    node.forecast(4, [1])
    node.release(0)
    assert node.stopping == {0}
    node.stop_load()
    assert node.load_keys == [(4, 1)]
    assert node.stopping == set(), "nothing is broken off twice"


def test_an_unwanted_load_is_not_broken_off_for_nothing_but_as_soon_as_something_comes() -> None:
    node = NodeRig(num_slots=2)
    node.forecast(0, [3])
    node.release(0)
    assert node.stopping == set()
    node.forecast(4, [1])
    assert node.stopping == {node.loading[0].slot}


def test_a_need_goes_ahead_of_a_forecast_that_is_loading_and_stays_wanted() -> None:
    node = NodeRig(num_slots=1)
    node.forecast(3, [0])
    node.compute(1, [5])
    assert node.stopping == {0}
    node.stop_load()
    assert node.load_keys == [(1, 5)], "the need first"
    node.end_load()
    node.end_compute()
    assert node.load_keys == [(3, 0)], "then the forecast that gave way"
    node.finish()
    assert node.held == {(3, 0)}


def test_a_load_that_ends_before_it_hears_counts_as_loaded() -> None:
    node = NodeRig(num_slots=2)
    node.forecast(3, [0])
    node.compute(1, [5])
    assert node.stopping
    node.end_load()
    assert Loaded(layer=3, expert=0, load_s=0.5, load_bytes=1000, on_demand=False) in node.told
    assert node.load_keys == [(1, 5)]
    node.finish()
    assert node.held == {(3, 0)}
    assert node.state.counters.loads_broken_off == 0


def test_a_load_that_breaks_while_it_is_being_stopped_is_a_failed_one() -> None:
    node = NodeRig(num_slots=1)
    node.forecast(3, [0])
    node.compute(1, [5])
    node.break_load()
    assert node.load_keys == [(1, 5)]
    node.finish()
    assert (node.state.counters.loads_failed, node.state.counters.loads_broken_off) == (1, 0)


def test_what_a_compute_waits_for_is_never_broken_off() -> None:
    node = NodeRig(num_slots=1)
    node.forecast(0, [3])
    node.compute(0, [3, 5])
    node.compute(0, [6], spans=[Span(2, 0, 1)])
    assert node.stopping == set()
    node.end_load()
    assert node.answers == []
    node.finish()
    assert len(node.answers) == 2


def test_a_certain_load_is_not_broken_off_for_a_need() -> None:
    node = NodeRig(num_slots=2)
    node.load(3, [0])
    node.compute(1, [5], spans=[Span(2, 0, 1)])
    assert node.stopping == set()


def test_a_load_that_was_broken_off_and_is_needed_after_all_is_loaded_again() -> None:
    node = NodeRig(num_slots=1)
    node.forecast(3, [0])
    node.compute(1, [5])
    node.compute(3, [0], position=0)
    node.stop_load()
    assert node.load_keys == [(1, 5)], "older needs first"
    node.finish()
    assert node.outcomes() == {0: "miss"}
    assert len(node.answers) == 2


def test_a_forecast_near_its_end_is_waited_for_where_it_can_stay() -> None:
    node = one_load_known(num_slots=2)
    node.forecast(3, [0])
    node.now += 1.0 - NEAR_THE_END
    node.compute(1, [5])
    assert node.stopping == set()
    node.end_load()
    assert node.load_keys == [(1, 5)]
    assert (3, 0) in node.held


def test_a_forecast_near_its_end_that_would_lose_its_slot_is_not_waited_for() -> None:
    node = one_load_known(num_slots=1)
    node.forecast(3, [0])
    node.now += 1.0 - NEAR_THE_END
    node.compute(1, [5])
    assert node.stopping == {0}


def test_a_forecast_near_its_end_is_waited_for_where_one_needed_later_makes_room() -> None:
    node = one_load_known(num_slots=2)
    node.forecast(9, [0])
    node.end_load(1.0)
    node.forecast(3, [0])
    node.now += 1.0
    node.compute(1, [5])
    assert node.stopping == set()
    node.end_load()
    assert node.held == {(3, 0), (1, 5)}


@pytest.mark.parametrize("elapsed_s", [0.0, 0.7, 1.3])
def test_a_forecast_far_from_its_end_or_long_overdue_is_broken_off(elapsed_s: float) -> None:
    node = one_load_known(num_slots=2)
    node.forecast(3, [0])
    node.now += elapsed_s
    node.compute(1, [5])
    assert node.stopping == {node.loading[0].slot}


def test_only_as_many_loads_are_broken_off_as_are_in_the_way() -> None:
    node = NodeRig(num_slots=3, max_loading=2)
    node.forecast(3, [0, 1])
    node.compute(1, [5])
    assert len(node.stopping) == 1
    node.loading.sort(key=lambda order: order.slot not in node.stopping)
    node.stop_load()
    assert set(node.load_keys) == {(3, 1), (1, 5)} or set(node.load_keys) == {(3, 0), (1, 5)}
    assert node.stopping == set()


def test_each_need_costs_at_most_one_broken_load_and_the_forecast_ends_at_last() -> None:
    """Needs of another sequence come again and again while the forecast is loading."""
    node = NodeRig(num_slots=1)
    node.forecast(9, [0])
    for number in range(50):
        node.compute(1, [number % 7], spans=[Span(2, number, 1)])
        node.stop_load()
        assert node.load_keys == [(1, number % 7)]
        node.end_load()
        node.end_compute()
        assert node.load_keys == [(9, 0)]
    assert len(node.answers) == node.state.counters.loads_broken_off == 50
    node.compute(9, [0])
    node.compute(1, [3], spans=[Span(2, 50, 1)])
    assert node.stopping == set(), "confirmed by the gate, it gives way no more"
    node.finish()
    assert len(node.answers) == 52


def test_a_lost_servers_load_gives_way_to_the_next_servers() -> None:
    node = NodeRig(num_slots=1)
    node.forecast(0, [3])
    node.event(ServerLost())
    node.join(epoch=1)
    assert node.stopping == set()
    node.forecast(0, [5])
    assert node.actions == [BreakOff(0)]
    node.stop_load()
    assert isinstance(node.actions[0], StartLoad)
    node.finish()
    assert node.held == {(0, 5)}
