"""Waking and waiting without a clock: what is ready ends the wait at once, what is not lets it run out."""

import threading
from collections.abc import Iterator

import pytest
import zmq

from odmoe_wire import messages as m
from odmoe_wire.codec import Limits
from odmoe_wire.link import DealerLink, RouterLink
from odmoe_wire.loopback import LoopbackNetwork
from odmoe_wire.waiting import Wake, wait

LONG_S = 30.0


@pytest.fixture
def wake() -> Iterator[Wake]:
    wake = Wake()
    yield wake
    wake.close()


def test_set_stays_until_cleared(wake: Wake) -> None:
    assert wait([], wake, timeout_s=0.0) is None
    wake.set()
    wake.set()
    assert wait([], wake, timeout_s=LONG_S) is not None
    assert wait([], wake, timeout_s=LONG_S) is not None
    wake.clear()
    assert wait([], wake, timeout_s=0.0) is None
    wake.clear()
    wake.set()
    assert wait([], wake, timeout_s=LONG_S) is not None


def test_set_from_another_thread_ends_a_wait(wake: Wake) -> None:
    thread = threading.Thread(target=wake.set)
    thread.start()
    assert wait([], wake, timeout_s=LONG_S) is not None
    thread.join()


def test_a_past_deadline_does_not_wait(wake: Wake) -> None:
    assert wait([], wake, timeout_s=-5.0) is None


def test_after_close_set_and_clear_do_nothing() -> None:
    wake = Wake()
    wake.close()
    wake.close()
    wake.set()
    wake.clear()


def test_a_message_ends_a_wait(wake: Wake) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    server = RouterLink.bind("inproc://wait", context=context, accept=m.ToServer, limits=Limits())
    node = DealerLink.connect(
        "inproc://wait", identity="n", peer="server", context=context, accept=m.ToNode, limits=Limits()
    )
    try:
        assert wait([server, node], wake, timeout_s=0.0) is None
        node.send("server", m.Heartbeat(count=0), epoch=0)
        assert wait([server, node], wake, timeout_s=LONG_S) is not None
        assert server.receive() is not None
        assert wait([server, node], wake, timeout_s=0.0) is None
    finally:
        node.close()
        server.close()
        context.term()


def test_a_loopback_link_never_sleeps(wake: Wake) -> None:
    link = LoopbackNetwork().router("server", accept=m.ToServer, limits=Limits())
    assert wait([link], wake, timeout_s=LONG_S) is not None
