"""The node's core where experts are computed as they arrive: who rides on which load, and which end comes first."""

import pytest

from odmoe_node.events import (
    Answer,
    ComputeBroke,
    ComputeDone,
    LoadBroke,
    LoadDone,
    Mention,
    ServerLost,
    StartCompute,
    StartLoad,
    Tick,
)
from odmoe_node.slots import Computing, Free, Loading, Ready, Resting, Riding
from odmoe_node.state import PATIENCE
from odmoe_wire.messages import ComputeFailed, Loaded, LoadFailed, Result, Span
from support.node_rig import NodeRig


def riding(*, num_slots: int = 1) -> NodeRig:
    """A node of which the gate has asked for a forecast expert whose load is under way."""
    node = NodeRig(num_slots=num_slots, on_arrival=True)
    node.forecast(0, [1])
    node.compute(0, [1])
    return node


def kinds(node: NodeRig) -> list[type]:
    """What the last event led to, in order."""
    return [type(action) for action in node.actions]


def failures(node: NodeRig) -> list[tuple[int, str]]:
    return [(answer.request_id, answer.code) for answer in node.answers if isinstance(answer, ComputeFailed)]


def test_an_expert_on_its_way_is_computed_as_it_arrives() -> None:
    node = riding()
    assert node.actions == [StartCompute(0, (0, 1), 0, on_arrival=True)]  # type: ignore[arg-type]
    assert isinstance(node.state.slot(0), Riding)
    assert not node.state.is_brief(node.computing[0]), "it will wait, and not where messages are heard"


def test_where_a_bank_cannot_nobody_rides() -> None:
    node = NodeRig(num_slots=1)
    node.compute(0, [1])
    assert kinds(node) == [StartLoad]


def test_a_missing_expert_is_computed_as_it_arrives() -> None:
    node = NodeRig(num_slots=1, on_arrival=True)
    node.compute(0, [1])
    assert kinds(node) == [StartLoad, StartCompute], "in the order in which a bank has to hear of them"
    node.end_load()
    node.end_compute()
    assert node.outcomes() == {1: "miss"}
    assert node.held == set()


def test_an_expert_that_is_there_is_computed_as_ever() -> None:
    node = NodeRig(num_slots=1, on_arrival=True)
    node.forecast(0, [1])
    node.end_load()
    node.compute(0, [1])
    assert [order.on_arrival for order in node.computing] == [False]


def test_the_load_ends_first_and_lets_nothing_begin() -> None:
    node = riding()
    node.forecast(4, [2])
    assert not node.state.awaits_load, "nobody need wake for it"
    node.end_load()
    assert kinds(node) == [Mention]
    assert Loaded(layer=0, expert=1, load_s=0.5, load_bytes=1000, on_demand=False) in node.told
    assert isinstance(node.state.slot(0), Computing)
    node.end_compute()
    assert kinds(node) == [StartLoad, Answer]
    assert node.outcomes() == {1: "late"}
    assert node.state.counters.loads_unused == 0


def test_the_compute_ends_first_and_the_slot_is_free_when_the_load_has_ended() -> None:
    node = riding()
    node.end_compute()
    assert kinds(node) == [Answer]
    assert isinstance(node.state.slot(0), Loading)
    assert node.state.accounted_bytes == 1000
    node.end_load()
    assert isinstance(node.state.slot(0), Free)
    assert (node.state.counters.loads, node.state.counters.loads_unused) == (1, 0)


def test_the_link_is_busy_until_the_load_has_ended_whatever_the_compute_does() -> None:
    node = riding(num_slots=2)
    node.forecast(4, [2])
    assert node.state.awaits_load, "the link could take the next"
    node.end_compute()
    assert node.load_keys == [(0, 1)]
    node.end_load()
    assert node.load_keys == [(4, 2)]


def test_with_more_slots_the_next_load_begins_beside_the_compute() -> None:
    node = riding(num_slots=2)
    node.forecast(4, [2])
    node.end_load()
    assert kinds(node) == [StartLoad, Mention]
    assert len(node.computing) == 1


def test_what_rows_waited_for_is_waiting_and_not_computing() -> None:
    node = riding()
    node.end_load()
    node.end_compute(waited_s=2.0)
    result = node.answers[0]
    assert isinstance(result, Result)
    assert result.timings[0].wait_s == pytest.approx(2.0)
    assert result.timings[0].compute_s == 0.25
    assert node.state.counters.compute_s == 0.25


def test_only_the_oldest_of_several_rides() -> None:
    node = riding()
    node.compute(0, [1], spans=[Span(2, 0, 1)])
    node.compute(0, [1], spans=[Span(3, 0, 1)])
    assert [order.request_id for order in node.computing] == [0]
    node.end_compute()
    assert node.computing == [], "a load carries one"
    node.end_load()
    assert [(order.request_id, order.on_arrival) for order in node.computing] == [(1, False)]
    node.finish()
    assert [answer.request_id for answer in node.answers] == [0, 1, 2]
    assert [node.outcomes(number) for number in range(3)] == [{1: "late"}] * 3
    assert node.state.counters.loads == 1


def test_a_load_that_is_ridden_is_not_broken_off() -> None:
    node = riding()
    node.cancel()
    node.forecast(4, [2], sequence=2)
    node.compute(1, [5], spans=[Span(2, 0, 1)])
    assert node.stopping == set()
    node.finish()
    assert node.outcomes() == {5: "miss"}


def test_a_load_that_was_broken_off_is_not_ridden_but_used_if_it_ends_after_all() -> None:
    node = NodeRig(num_slots=1, on_arrival=True)
    node.forecast(3, [0])
    node.compute(1, [5])
    assert node.stopping == {0}
    node.compute(3, [0])
    assert node.computing == []
    node.end_load()
    assert [(order.key, order.on_arrival) for order in node.computing] == [((3, 0), False)]
    node.finish()
    assert len(node.answers) == 2


def test_a_broken_load_fails_its_rider_once_and_its_slot_is_free_after_the_compute() -> None:
    node = riding()
    node.compute(0, [1], spans=[Span(2, 0, 1)])
    node.break_load()
    assert failures(node) == [(0, "load_failed"), (1, "load_failed")]
    assert LoadFailed(layer=0, expert=1, reason="disk on fire") in node.told
    assert node.state.used_slots == 1, "somebody is at work there"
    node.break_compute("the load ended early")
    assert len(node.answers) == 2
    assert node.state.used_slots == 0


def test_a_compute_that_noticed_first_that_its_load_broke_fails_as_it() -> None:
    node = riding()
    node.break_compute("the load ended early")
    assert node.answers == []
    assert node.computing == [], "not on the same load again"
    node.break_load()
    assert failures(node) == [(0, "load_failed")]
    assert node.state.used_slots == 0


def test_a_compute_that_broke_on_a_good_load_is_done_again_after_it() -> None:
    node = riding()
    node.compute(0, [1], spans=[Span(2, 0, 1)])
    node.break_compute()
    node.end_load()
    assert [(order.request_id, order.on_arrival) for order in node.computing] == [(0, False)], "the oldest still"
    node.break_compute("no such rows")
    assert failures(node) == [(0, "bad_request")]
    node.finish()
    assert len(node.answers) == 2


def test_an_expert_wanted_anew_after_its_ridden_load_broke_is_loaded_again() -> None:
    node = riding()
    node.break_load()
    node.forecast(0, [1], sequence=2, position=3)
    assert node.loading == []
    node.break_compute()
    assert node.load_keys == [(0, 1)]


def test_a_result_after_its_load_broke_is_nobodys_and_the_slot_is_not_trusted() -> None:
    node = riding()
    node.break_load()
    node.compute(0, [1], position=1)
    node.end_compute()
    assert node.load_keys == [(0, 1)]
    node.finish()
    assert failures(node) == [(0, "load_failed")]
    assert node.outcomes() == {1: "hit"}


@pytest.mark.parametrize("load_first", [True, False])
def test_a_cancelled_rider_is_forgotten_and_both_ends_free_the_slot(load_first: bool) -> None:
    node = riding()
    node.cancel()
    assert node.forgotten == 1
    end_both(node, load_first=load_first)
    assert node.answers == []
    assert node.state.used_slots == 0


@pytest.mark.parametrize("load_first", [True, False])
def test_an_expired_rider_is_answered_once(load_first: bool) -> None:
    node = NodeRig(num_slots=1, on_arrival=True)
    node.compute(0, [1], ttl_s=0.5)
    node.now += 1.0
    node.event(Tick())
    assert failures(node) == [(0, "expired")]
    end_both(node, load_first=load_first)
    assert len(node.answers) == 1
    assert node.state.used_slots == 0


@pytest.mark.parametrize("load_first", [True, False])
def test_a_lost_server_leaves_both_to_end_for_nobody(load_first: bool) -> None:
    node = riding()
    node.event(ServerLost())
    node.join(epoch=1)
    node.compute(0, [1], request_id=0)
    end_both(node, load_first=load_first)
    assert node.answers == [], "that was another server's request of the same number"
    node.finish()
    assert node.outcomes().keys() == {1}
    assert node.state.used_slots == 0


@pytest.mark.parametrize("load_first", [True, False])
def test_released_meanwhile_the_slot_goes_to_the_next_when_both_have_ended(load_first: bool) -> None:
    node = riding()
    node.forecast(4, [2])
    node.release(0)
    end_both(node, load_first=load_first)
    assert node.load_keys == [(4, 2)]
    assert node.state.counters.loads_broken_off == 0


@pytest.mark.parametrize("load_first", [True, False])
def test_in_lru_mode_it_rests_when_both_have_ended(load_first: bool) -> None:
    node = NodeRig(num_slots=2, on_arrival=True)
    node.view(epoch=1, mode="lru")
    node.compute(0, [1])
    end_both(node, load_first=load_first)
    slot = node.state.slot(0)
    assert isinstance(slot, Resting)
    assert slot.used


def test_still_wanted_it_stays() -> None:
    node = riding()
    node.forecast(0, [1], sequence=2)
    node.end_compute()
    node.end_load()
    slot = node.state.slot(0)
    assert isinstance(slot, Ready)
    assert slot.used


def test_an_older_need_that_was_passed_over_too_often_gets_the_slot_of_a_load() -> None:
    """Computes of others ride on their loads again and again, on the only slot."""
    node = NodeRig(num_slots=1, on_arrival=True)
    node.compute(0, [1], spans=[Span(2, 0, 1)])
    node.compute(5, [5], spans=[Span(3, 0, 1)])
    for number in range(1, PATIENCE + 4):
        node.compute(0, [1], spans=[Span(2, number, 1)])
        if node.loading:
            node.end_load()
        if node.computing[0].key == (5, 5):
            break
        node.end_compute()
    assert number <= PATIENCE + 2
    node.finish()
    assert node.state.num_requests == 0


def end_both(node: NodeRig, *, load_first: bool) -> None:
    load, compute = node.loading.pop(0), node.computing.pop(0)
    ends = [LoadDone(load.slot, 0.5, node.now), ComputeDone(compute.slot, 0.25)]
    for event in ends if load_first else reversed(ends):
        node.event(event)


@pytest.mark.parametrize("load_first", [True, False])
def test_both_may_break(load_first: bool) -> None:
    node = riding(num_slots=2)
    load, compute = node.loading.pop(0), node.computing.pop(0)
    ends = [LoadBroke(load.slot, "disk on fire"), ComputeBroke(compute.slot, "ended early")]
    for event in ends if load_first else reversed(ends):
        node.event(event)
    assert failures(node) == [(0, "load_failed")]
    assert node.state.used_slots == 0
