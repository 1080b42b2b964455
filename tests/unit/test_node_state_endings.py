"""How work ends before its time: cancelled, expired, failed, of a former view or server; and bounds. Pure, no sleep."""

import pytest

from odmoe_node.events import ComputeBroke, ServerLost, Tick, Told
from odmoe_node.state import PATIENCE
from odmoe_wire.messages import ComputeFailed, LoadFailed, Schedule, Span
from support.node_rig import NodeRig


def test_cancel_takes_everything_of_the_sequence_and_answers_nothing() -> None:
    node = NodeRig(num_slots=2)
    node.forecast(4, [0])
    node.end_load()
    node.load(5, [1])
    node.compute(3, [2])
    node.cancel()
    node.finish()
    assert node.answers == []
    assert node.forgotten == 1
    assert node.held == set()
    assert node.state.num_wants == 0
    node.forecast(6, [0])
    assert node.loading == []
    assert node.state.counters.late_forecasts == 1


def test_a_compute_for_two_sequences_goes_on_when_one_is_cancelled() -> None:
    node = NodeRig(num_slots=1)
    node.compute(0, [0], spans=[Span(1, 0, 1), Span(2, 0, 1)])
    node.cancel(1)
    node.finish()
    assert len(node.answers) == 1


def test_a_compute_cancelled_while_computing_ends_silently() -> None:
    node = NodeRig(num_slots=1)
    node.compute(0, [0])
    node.end_load()
    node.cancel()
    assert node.held == {(0, 0)}
    node.end_compute()
    assert (node.held, node.answers) == (set(), [])


def test_duplicates_are_ignored_and_counted_while_in_hand_and_after() -> None:
    node = NodeRig(num_slots=1)
    node.compute(0, [0], request_id=7)
    node.compute(0, [0], request_id=7)
    node.finish()
    node.compute(0, [0], request_id=7)
    node.finish()
    assert len(node.answers) == 1
    assert node.state.counters.duplicates == 2


def test_an_expired_compute_is_answered_and_its_needs_dropped() -> None:
    node = NodeRig(num_slots=1)
    node.compute(0, [0, 1, 2], ttl_s=1.0)
    assert node.state.next_deadline_s() == pytest.approx(1.003)
    node.now = 1.0
    node.event(Tick())
    assert node.answers == []
    node.now = 5.0
    node.event(Tick())
    failed = node.answers[0]
    assert isinstance(failed, ComputeFailed)
    assert failed.code == "expired"
    node.finish()
    assert node.held == set()
    assert node.state.counters.loads == 1
    assert node.state.next_deadline_s() is None


def test_a_failed_load_fails_the_computes_that_need_it_and_no_other() -> None:
    node = NodeRig(num_slots=2)
    node.forecast(0, [0], sequence=3)
    node.compute(0, [0, 1])
    node.compute(0, [2])
    assert node.break_load("no such page") == (0, 0)
    assert node.told == [LoadFailed(layer=0, expert=0, reason="no such page")]
    node.finish()
    failed, fine = node.answers
    assert isinstance(failed, ComputeFailed)
    assert (failed.request_id, failed.code) == (0, "load_failed")
    assert "no such page" in failed.reason
    assert fine.request_id == 1
    assert node.held == set()
    assert node.state.counters.loads_failed == 1


def test_a_failed_compute_is_answered_with_its_reason() -> None:
    node = NodeRig(num_slots=1)
    node.compute(0, [0, 1])
    node.end_load()
    node.event(ComputeBroke(node.computing.pop().slot, "wrong width"))
    node.finish()
    (failed,) = node.answers
    assert isinstance(failed, ComputeFailed)
    assert "wrong width" in failed.reason
    assert node.held == set()


def test_schedules_and_loads_of_a_former_view_are_dropped_and_counted() -> None:
    node = NodeRig(num_slots=2)
    node.view(epoch=2)
    node.forecast(0, [0], epoch=1)
    node.load(0, [0], epoch=1)
    assert node.loading == []
    assert node.state.counters.stale == 2
    node.forecast(0, [0], epoch=3)
    assert node.load_keys == [(0, 0)], "the predictor may know the next view first"


def test_computes_of_a_former_view_are_served_but_not_those_of_a_former_incarnation() -> None:
    node = NodeRig(num_slots=2, joined=False)
    node.compute(0, [0], epoch=4)
    node.join(epoch=5)
    node.compute(0, [0], epoch=4)
    assert node.loading == []
    assert node.state.counters.stale == 2
    node.view(epoch=6)
    node.compute(0, [0], epoch=5)
    node.finish()
    assert len(node.answers) == 1


def test_a_second_welcome_changes_nothing() -> None:
    node = NodeRig(num_slots=2)
    node.compute(0, [0])
    node.join(epoch=1)
    node.finish()
    node.compute(0, [0])
    node.finish()
    assert len(node.answers) == 2


def test_a_lost_server_takes_its_work_with_it() -> None:
    node = NodeRig(num_slots=3)
    node.forecast(1, [1])
    node.compute(0, [0])
    node.end_load()
    node.end_load()
    assert len(node.computing) == 1
    node.event(ServerLost())
    node.finish()
    assert (node.held, node.answers, node.forgotten) == (set(), [], 1)
    node.compute(0, [0])
    assert node.loading == []
    node.join(epoch=1)
    node.compute(0, [0], request_id=0)
    node.finish()
    assert len(node.answers) == 1


def test_a_view_of_a_lower_epoch_is_another_server() -> None:
    node = NodeRig(num_slots=1, joined=False)
    node.join(epoch=9)
    node.compute(0, [0], request_id=5, epoch=9)
    node.end_load()
    node.view(epoch=1)
    node.compute(0, [0], request_id=5, epoch=1)
    assert node.end_compute() == (0, 0)
    assert node.answers == [], "that was the other server's request of the same id"
    node.finish()
    assert len(node.answers) == 1


def test_younger_computes_cannot_starve_an_older_one_of_a_slot() -> None:
    node = NodeRig(num_slots=1)
    node.compute(0, [0, 1])
    node.end_load()
    for i in range(3 * PATIENCE):
        node.compute(0, [0], spans=[Span(100 + i, 0, 1)])
        node.end_compute()
        if node.load_keys == [(0, 1)]:
            break
    else:
        raise AssertionError("the older compute never got its slot")
    node.finish()
    assert {answer.request_id for answer in node.answers} == set(range(i + 2))


def test_a_flood_of_forecasts_is_bounded() -> None:
    node = NodeRig(num_slots=1)
    for position in range(200):
        schedule = Schedule(span=Span(1, position), layer=0, experts=list(range(100)))
        node.state.handle(Told(schedule, 1), 0.0)
    assert node.state.num_wants == 16_300
    assert node.state.counters.overflowed == 200 - 163


def test_the_story_tells_what_came_and_what_was_done() -> None:
    node = NodeRig(num_slots=1)
    node.compute(0, [0])
    assert [what for _, what, _ in node.state.story] == ["event", "event", "event", "action"]
    for _ in range(2000):
        node.event(Tick())
    assert len(node.state.story) == 512


def test_a_withdrawn_compute_is_not_begun_and_not_answered() -> None:
    node = NodeRig(num_slots=1)
    node.compute(0, [1])
    unneeded = node.compute(0, [2, 3])
    node.withdraw(unneeded)
    node.finish()
    assert [answer.request_id for answer in node.answers] == [0]
    assert node.state.counters.loads == 1
    assert node.forgotten == 1, "its rows are dropped"
    assert (node.state.used_slots, node.state.num_requests) == (0, 0)


def test_of_a_withdrawn_compute_what_has_begun_ends_and_the_rest_does_not_begin() -> None:
    node = NodeRig(num_slots=1)
    begun = node.compute(0, [1, 2])
    node.end_load()
    node.withdraw(begun)
    assert node.end_compute() == (0, 1)
    node.finish()
    assert node.answers == []
    assert node.state.counters.loads == 1
    assert node.state.used_slots == 0


def test_withdrawing_what_is_not_in_hand_does_nothing() -> None:
    node = NodeRig(num_slots=1)
    done = node.compute(0, [1])
    node.finish()
    for request_id in (done, 77):
        node.withdraw(request_id)
    assert [answer.request_id for answer in node.answers] == [done]
