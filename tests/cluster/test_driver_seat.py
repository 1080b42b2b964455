"""Who drives the cluster's link: its own thread between answers, and whoever waits for a call while there are some."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import zmq

from odmoe_server.cluster.calls import CallError, PendingCall
from odmoe_server.cluster.driver import RESERVED_S, ClusterDriver
from odmoe_server.cluster.events import LayerCall
from odmoe_server.cluster.peers import ClusterConfig
from odmoe_server.cluster.state import ClusterState
from odmoe_wire.checks import Limits
from odmoe_wire.link import RouterLink
from odmoe_wire.messages import Span, ToServer

CONFIG = ClusterConfig(store_digest="d", package_version="1", num_layers=1, num_experts=8, group_size=1)


class Driver(ClusterDriver):
    """Notes which threads pump."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.pumped_by: list[str] = []
        super().__init__(*args, **kwargs)

    def pump(self, now: float) -> bool:
        self.pumped_by.append(threading.current_thread().name)
        return super().pump(now)


@pytest.fixture
def driver() -> Iterator[Driver]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    link = RouterLink.bind("inproc://seat", context=context, accept=ToServer, limits=Limits())
    driver = Driver(ClusterState(config=CONFIG), link=link)
    driver.start()
    try:
        yield driver
    finally:
        driver.stop()
        context.term()


def submitted(driver: Driver, call_id: int = 1) -> PendingCall:
    call = LayerCall(call_id=call_id, spans=(Span(1, 0),), layer=0, counts={3: 1})
    return driver.submit(call, {3: torch.ones(1, 4)})


def until(what: Any) -> None:
    end_s = time.monotonic() + 10.0
    while not what():
        assert time.monotonic() < end_s
        time.sleep(0.002)


def test_who_waits_drives_and_the_thread_takes_over_afterwards(driver: Driver) -> None:
    until(lambda: driver.pumped_by)
    assert set(driver.pumped_by) == {"cluster"}
    pending = submitted(driver)
    assert not driver.await_for(pending, timeout_s=0.3), "there is no node"
    here = threading.current_thread().name
    assert here in driver.pumped_by[-3:]
    assert "cluster" not in driver.pumped_by[driver.pumped_by.index(here) :]
    driver.pumped_by.clear()
    until(lambda: "cluster" in driver.pumped_by)


def test_a_job_is_done_at_once_by_whoever_has_the_seat(driver: Driver) -> None:
    pending = submitted(driver)
    until(lambda: driver.state.dispatch.calls)
    waiter = threading.Thread(target=driver.await_for, args=(pending,), kwargs={"timeout_s": 5.0})
    waiter.start()
    until(driver._seat.locked)
    driver.give_up(pending)  # from here, while the other has the seat
    until(lambda: not driver.state.dispatch.calls)
    driver.stop()
    waiter.join(2.0)
    assert not waiter.is_alive(), "a stop ends the wait"


def test_between_two_calls_of_one_answer_jobs_are_done_here(driver: Driver) -> None:
    driver.await_for(submitted(driver), timeout_s=0.1)
    before = len(driver.pumped_by)
    submitted(driver, call_id=2)
    assert 2 in driver.state.dispatch.calls, "not on the way to another thread"
    assert len(driver.pumped_by) == before
    assert RESERVED_S > 0.0


def test_a_bad_event_ends_no_wait(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(driver.state, "handle", fails)
        pending = submitted(driver)
        until(lambda: driver.driver_errors_total > 0)
        assert not driver.await_for(pending, timeout_s=0.2)
    driver.is_unheard = lambda: True
    with pytest.raises(CallError, match="nobody waits"):
        driver.await_call(submitted(driver, call_id=2))
