"""Where a node's slow work runs."""

import threading

from odmoe_node.events import ComputeDone, LoadBroke, LoadDone
from odmoe_node.lanes import Inbox, InlineLane, Job, ThreadLane
from odmoe_wire.waiting import Wake, wait


def failing() -> LoadDone:
    raise OSError("disk on fire")


def test_a_job_that_raises_still_ends_with_an_event() -> None:
    wake = Wake()
    inbox = Inbox(wake)
    lane = InlineLane(inbox)
    lane.submit(Job(failing, lambda reason: LoadBroke(3, reason)))
    assert inbox.take() == LoadBroke(3, "OSError: disk on fire")
    assert inbox.take() is None
    wake.close()


def test_the_end_of_a_load_wakes_nobody_who_said_it_can_wait() -> None:
    wake = Wake()
    inbox = Inbox(wake)

    def woken() -> bool:
        return wait([], wake, timeout_s=0.0) is not None

    inbox.let_loads_wait(True)
    inbox.put(LoadDone(0, 0.0, 0.0))
    assert not woken()
    inbox.let_loads_wait(True)
    assert not woken()
    inbox.let_loads_wait(False)
    assert woken(), "what came in just before is not missed"
    assert inbox.take() == LoadDone(0, 0.0, 0.0)
    for can_wait, event in ((False, LoadDone(0, 0.0, 0.0)), (True, LoadBroke(1, "x")), (True, ComputeDone(1, 0.0))):
        wake.clear()
        inbox.let_loads_wait(can_wait)
        inbox.put(event)
        assert woken()
        assert inbox.take() == event
    wake.close()


def test_a_thread_lane_works_beside_the_caller_in_order_and_stops() -> None:
    wake = Wake()
    inbox = Inbox(wake)
    prepared_in: list[str] = []
    lane = ThreadLane(inbox, name="lane", prepare=lambda: prepared_in.append(threading.current_thread().name))
    gate, began = threading.Event(), threading.Event()

    def gated() -> LoadDone:
        began.set()
        assert gate.wait(10)
        return LoadDone(0, 0.0, 0.0)

    lane.submit(Job(gated, lambda reason: LoadBroke(0, reason)))
    lane.submit(Job(lambda: LoadDone(1, 0.0, 0.0), lambda reason: LoadBroke(1, reason)))
    assert began.wait(10)
    assert prepared_in == ["lane"]
    assert inbox.take() is None
    assert not lane.stop(timeout_s=0.0)
    gate.set()
    assert lane.stop(timeout_s=10)
    assert [inbox.take(), inbox.take()] == [LoadDone(0, 0.0, 0.0), LoadDone(1, 0.0, 0.0)]
    wake.close()
