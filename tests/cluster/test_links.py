"""Links over real sockets: what arrives, who is gone, who comes back, and who is not let in."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from odmoe_wire import endpoints, keys
from odmoe_wire import messages as m
from odmoe_wire.codec import Blob, Limits, Received, encode
from odmoe_wire.endpoints import EndpointError
from odmoe_wire.keys import CurveKeys, Gatekeeper, KeysError
from odmoe_wire.link import DealerLink, Link, PeerGone, RouterLink
from odmoe_wire.waiting import Wake, wait

DEADLINE_S = 10.0
LIMITS = Limits(max_blob_bytes=1 << 20)
Context = zmq.Context[zmq.Socket[bytes]]
COMPUTE = m.Compute(request_id=1, spans=[m.Span(1, 0, 1)], layer=0, experts=[1], counts=[2], ttl_s=1.0)
ROWS_TH = Blob("bfloat16", (2, 4), bytes(range(16)))


@pytest.fixture
def wake() -> Iterator[Wake]:
    wake = Wake()
    yield wake
    wake.close()


@pytest.fixture(params=["inproc", "ipc", "tcp"])
def endpoint(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return {"inproc": "inproc://here", "ipc": f"ipc://{tmp_path}/s", "tcp": "tcp://127.0.0.1:*"}[request.param]


class Wiring:
    """Opens links and raw sockets in one context and closes them all at the end of the test."""

    def __init__(self) -> None:
        self.context: Context = zmq.Context()
        self._opened: list[RouterLink | DealerLink | zmq.Socket[bytes]] = []

    def router(
        self, endpoint: str = "tcp://127.0.0.1:*", *, own: CurveKeys | None = None, hwm: int = 100
    ) -> RouterLink:
        link = RouterLink.bind(endpoint, context=self.context, accept=m.ToServer, limits=LIMITS, keys=own, hwm=hwm)
        self._opened.append(link)
        return link

    def dealer(
        self, endpoint: str, *, name: str = "node-1", own: CurveKeys | None = None, hwm: int = 100
    ) -> DealerLink:
        link = DealerLink.connect(
            endpoint,
            identity=name,
            peer="server",
            context=self.context,
            accept=m.ToNode,
            limits=LIMITS,
            keys=own,
            hwm=hwm,
        )
        self._opened.append(link)
        return link

    def raw(self, endpoint: str, *, name: bytes = b"") -> zmq.Socket[bytes]:
        socket = self.context.socket(zmq.DEALER)
        self._opened.append(socket)
        socket.linger = 0
        if name:
            socket.routing_id = name
        socket.connect(endpoint)
        return socket

    def close(self) -> None:
        for opened in self._opened:
            opened.close()
        # Hangs when a link left a socket behind, which the test's time-out shows.
        self.context.term()


@pytest.fixture
def wiring() -> Iterator[Wiring]:
    wiring = Wiring()
    yield wiring
    wiring.close()


def receive(link: Link, wake: Wake) -> tuple[str, Received]:
    end_s = time.monotonic() + DEADLINE_S
    while time.monotonic() < end_s:
        if (got := link.receive()) is not None:
            return got
        wait([link], wake, timeout_s=end_s - time.monotonic())
    raise AssertionError("nothing came")


def until(attempt: Callable[[], bool]) -> None:
    """Try again, a little later each time, until it is true."""
    end_s = time.monotonic() + DEADLINE_S
    while not attempt():
        assert time.monotonic() < end_s, "it never came to that"
        time.sleep(0.005)


def sent(link: Link, peer: str, message: m.AnyMessage) -> bool:
    try:
        link.send(peer, message, epoch=0)
    except PeerGone:
        return False
    return True


def hello(link: Link, *, count: int = 0) -> None:
    """Send once there is a connection."""
    until(lambda: sent(link, "server", m.Heartbeat(count=count)))


def test_there_and_back(wiring: Wiring, endpoint: str, wake: Wake) -> None:
    server = wiring.router(endpoint)
    node = wiring.dealer(server.endpoint)
    hello(node, count=4)
    peer, received = receive(server, wake)
    assert (peer, received.message) == ("node-1", m.Heartbeat(count=4))
    server.send("node-1", COMPUTE, epoch=7, blobs=[ROWS_TH])
    peer, received = receive(node, wake)
    assert (peer, received.epoch, received.message, received.blobs) == ("server", 7, COMPUTE, (ROWS_TH,))
    # Tensors are laid over the frame's own memory, so it must be writable.
    assert isinstance(received.blobs[0].data, memoryview)
    assert not received.blobs[0].data.readonly


def test_big_blobs_arrive_whole(wiring: Wiring, endpoint: str, wake: Wake) -> None:
    server = wiring.router(endpoint)
    node = wiring.dealer(server.endpoint)
    hello(node)
    receive(server, wake)
    blob = Blob("uint8", (300_000,), bytes(range(250)) * 1200)
    align = m.Compute(request_id=1, spans=[m.Span(1, 0, 1)], layer=0, experts=[0], counts=[250], ttl_s=1.0)
    rows_TH = Blob("float32", (250, 300), blob.data)
    server.send("node-1", align, epoch=0, blobs=[rows_TH])
    assert receive(node, wake)[1].blobs == (rows_TH,)


def test_no_route_is_an_error(wiring: Wiring, endpoint: str) -> None:
    server = wiring.router(endpoint)
    with pytest.raises(PeerGone, match="node-1"):
        server.send("node-1", m.Heartbeat(count=0), epoch=0)


def test_a_node_that_went_is_gone(wiring: Wiring, endpoint: str, wake: Wake) -> None:
    server = wiring.router(endpoint)
    node = wiring.dealer(server.endpoint)
    hello(node)
    receive(server, wake)
    assert sent(server, "node-1", m.Heartbeat(count=0))
    node.close()
    until(lambda: not sent(server, "node-1", m.Heartbeat(count=0)))


def test_a_full_queue_is_an_error(wiring: Wiring, wake: Wake) -> None:
    server = wiring.router("inproc://narrow", hwm=5)
    node = wiring.dealer("inproc://narrow", hwm=5)
    hello(node)
    receive(server, wake)
    accepted = 0
    while accepted < 50 and sent(server, "node-1", m.Heartbeat(count=accepted)):
        accepted += 1
    assert 5 <= accepted <= 10
    # What was accepted is whole and in order, and once it was read there is room again.
    assert [receive(node, wake)[1].message for _ in range(accepted)] == [
        m.Heartbeat(count=count) for count in range(accepted)
    ]
    until(lambda: sent(server, "node-1", m.Heartbeat(count=0)))


def test_no_server_yet_is_an_error_and_not_a_queue(wiring: Wiring, tmp_path: Path) -> None:
    node = wiring.dealer(f"ipc://{tmp_path}/later")
    with pytest.raises(PeerGone, match="server"):
        node.send("server", m.Heartbeat(count=0), epoch=0)
    with pytest.raises(PeerGone, match="predictor"):
        node.send("predictor", m.Heartbeat(count=0), epoch=0)


def test_a_restarted_server_is_found_again(wiring: Wiring, wake: Wake) -> None:
    server = wiring.router()
    endpoint = server.endpoint
    node = wiring.dealer(endpoint)
    hello(node, count=1)
    receive(server, wake)
    server.close()
    until(lambda: not sent(node, "server", m.Heartbeat(count=2)))
    server = wiring.router(endpoint)
    hello(node, count=3)
    assert receive(server, wake)[1].message == m.Heartbeat(count=3)
    server.send("node-1", m.Heartbeat(count=4), epoch=0)
    assert receive(node, wake)[1].message == m.Heartbeat(count=4)


def test_a_restarted_node_takes_its_name_over(wiring: Wiring, endpoint: str, wake: Wake) -> None:
    server = wiring.router(endpoint)
    old = wiring.dealer(server.endpoint)
    hello(old, count=1)
    receive(server, wake)
    new = wiring.dealer(server.endpoint)
    hello(new, count=2)
    assert receive(server, wake)[1].message == m.Heartbeat(count=2)
    server.send("node-1", m.Heartbeat(count=3), epoch=0)
    assert receive(new, wake)[1].message == m.Heartbeat(count=3)
    assert old.receive() is None


def test_bad_messages_are_counted_and_told(wiring: Wiring, endpoint: str, wake: Wake) -> None:
    server = wiring.router(endpoint)
    node = wiring.dealer(server.endpoint)
    until(lambda: sent(node, "server", m.Start(sequence=1)))
    hello(node, count=1)
    assert receive(server, wake)[1].message == m.Heartbeat(count=1)
    assert server.protocol_errors == 1
    notice = receive(node, wake)[1].message
    assert isinstance(notice, m.ProtocolErrorNotice)
    assert "Start" in notice.reason


def test_a_flood_of_bad_messages_is_answered_seldom(wiring: Wiring, wake: Wake) -> None:
    server = wiring.router("inproc://flood")
    node = wiring.dealer("inproc://flood")
    for _ in range(64):
        until(lambda: sent(node, "server", m.Start(sequence=1)))
    assert server.receive() is None
    assert server.protocol_errors == 64
    hello(node)
    receive(server, wake)
    server.send("node-1", m.Heartbeat(count=9), epoch=0)
    notices = 0
    while isinstance(receive(node, wake)[1].message, m.ProtocolErrorNotice):
        notices += 1
    assert notices == 7


def test_a_peer_without_a_name_is_not_heard(wiring: Wiring, wake: Wake) -> None:
    server = wiring.router("inproc://named")
    raw = wiring.raw("inproc://named")
    raw.send_multipart(encode(m.Heartbeat(count=1), epoch=0))
    assert wait([server], wake, timeout_s=DEADLINE_S)
    assert server.receive() is None
    assert server.protocol_errors == 1


def test_a_frame_over_the_bound_ends_the_connection(wiring: Wiring, wake: Wake) -> None:
    server = wiring.router()
    raw = wiring.raw(server.endpoint, name=b"node-1")
    raw.send(bytes(max(LIMITS.max_blob_bytes, LIMITS.max_header_bytes) + 1))
    node = wiring.dealer(server.endpoint, name="node-2")
    hello(node, count=1)
    assert receive(server, wake)[0] == "node-2"
    assert server.protocol_errors == 0


@pytest.mark.parametrize("address", ["tcp://*:*", "tcp://0.0.0.0:*", "tcp://10.1.2.3:5000", "tcp://node-7:5000"])
def test_open_addresses_need_keys(wiring: Wiring, address: str) -> None:
    with pytest.raises(EndpointError, match="odmoe keys DIR"):
        wiring.router(address)
    with pytest.raises(EndpointError, match="odmoe keys DIR"):
        wiring.dealer(address)


@pytest.mark.parametrize(
    "address", ["", "tcp://", "tcp://:5", "tcp://h:x", "udp://127.0.0.1:1", "127.0.0.1:5", "ipc://"]
)
def test_what_is_no_endpoint(wiring: Wiring, address: str) -> None:
    with pytest.raises(EndpointError, match="tcp://HOST:PORT"):
        wiring.router(address)


def test_an_address_in_use(wiring: Wiring) -> None:
    taken = wiring.router().endpoint
    with pytest.raises(EndpointError, match=r"cannot bind .*in use"):
        wiring.router(taken)


def test_an_ipc_socket_is_its_owners_alone(wiring: Wiring, tmp_path: Path) -> None:
    wiring.router(f"ipc://{tmp_path}/private")
    assert (tmp_path / "private").stat().st_mode & 0o077 == 0


@pytest.fixture
def cluster_keys(tmp_path: Path) -> Path:
    keys.make(tmp_path / "keys", ["server", "node-1", "node-2"])
    return tmp_path / "keys"


def test_with_keys_messages_pass(wiring: Wiring, cluster_keys: Path, wake: Wake) -> None:
    server = wiring.router("tcp://*:*", own=CurveKeys.load(cluster_keys, name="server"))
    port = server.endpoint.rpartition(":")[2]
    node = wiring.dealer(f"tcp://127.0.0.1:{port}", own=CurveKeys.load(cluster_keys, name="node-1"))
    hello(node, count=1)
    assert receive(server, wake)[0] == "node-1"
    server.send("node-1", COMPUTE, epoch=0, blobs=[ROWS_TH])
    assert receive(node, wake)[1].message == COMPUTE


def test_who_checks_keys_goes_with_the_link(wiring: Wiring, cluster_keys: Path) -> None:
    own = CurveKeys.load(cluster_keys, name="server")
    first = wiring.router(own=own)
    with pytest.raises(EndpointError, match="twice in one context"):
        wiring.router(own=own)
    first.close()

    def again() -> bool:
        # libzmq frees names of closed sockets in the background.
        try:
            wiring.router(own=own)
        except EndpointError:
            return False
        return True

    until(again)


def test_strangers_and_the_keyless_are_kept_out(wiring: Wiring, cluster_keys: Path, tmp_path: Path, wake: Wake) -> None:
    server = wiring.router(own=CurveKeys.load(cluster_keys, name="server"))
    keys.make(tmp_path / "theirs", ["server", "node-1"])
    theirs = CurveKeys.load(tmp_path / "theirs", name="node-1")
    server_key = CurveKeys.load(cluster_keys, name="node-1").peers["server"]
    stranger = wiring.dealer(
        server.endpoint, own=CurveKeys("node-1", theirs.public, theirs.secret, {"server": server_key})
    )
    misled = wiring.dealer(server.endpoint, own=theirs)
    keyless = wiring.dealer(server.endpoint)
    # While a proper node gets through, they do not.
    node = wiring.dealer(server.endpoint, name="node-2", own=CurveKeys.load(cluster_keys, name="node-2"))
    hello(node)
    assert receive(server, wake)[0] == "node-2"
    for outsider in (stranger, misled, keyless):
        assert not sent(outsider, "server", m.Heartbeat(count=0))
    assert server.receive() is None


def test_a_name_that_nobody_answers_for_holds_up_its_own_link_only(tmp_path: Path, wake: Wake) -> None:
    # libzmq looks names up in the I/O thread, for seconds where no server of names answers.
    with endpoints.context(num_links=2) as context:
        options = {"identity": "node-1", "context": context, "accept": m.ToNode, "limits": LIMITS}
        links = [
            DealerLink.connect("ipc://" + str(tmp_path / peer), peer=peer, io_thread=number, **options)  # type: ignore[arg-type]
            for number, peer in enumerate(("server", "predictor"))
        ]
        assert [link.socket.affinity for link in links] == [0b01, 0b10]
        for link in links:
            link.close()


def test_a_gatekeeper_that_died_can_be_stopped(wiring: Wiring, cluster_keys: Path) -> None:
    gatekeeper = Gatekeeper(wiring.context, keys=CurveKeys.load(cluster_keys, name="server"))
    gatekeeper.start()
    gatekeeper.pipe.send(b"TERMINATE")
    gatekeeper.thread.join(DEADLINE_S)
    assert not gatekeeper.is_alive()
    gatekeeper.stop()
    gatekeeper.stop()


def test_a_key_serves_its_own_name_only(wiring: Wiring, cluster_keys: Path, wake: Wake) -> None:
    own = CurveKeys.load(cluster_keys, name="node-1")
    with pytest.raises(KeysError, match="node-2"):
        wiring.dealer("tcp://127.0.0.1:5", name="node-2", own=own)


def test_nobody_gets_what_is_sent_to_another_name(wiring: Wiring, cluster_keys: Path, wake: Wake) -> None:
    """An impostor has a key of its own, and calls itself what it likes."""
    server = wiring.router(own=CurveKeys.load(cluster_keys, name="server"))
    true = wiring.dealer(server.endpoint, name="node-2", own=CurveKeys.load(cluster_keys, name="node-2"))
    with pytest.raises(PeerGone, match="not heard of yet"):
        server.send("node-2", COMPUTE, epoch=0, blobs=[ROWS_TH])
    hello(true)
    assert receive(server, wake)[0] == "node-2"
    own = CurveKeys.load(cluster_keys, name="node-1")
    impostor = wiring.context.socket(zmq.DEALER)
    with impostor:
        impostor.linger = 0
        impostor.routing_id = b"node-2"
        impostor.curve_serverkey = own.public_key_of("server")
        impostor.curve_publickey, impostor.curve_secretkey = own.public, own.secret
        impostor.connect(server.endpoint)
        impostor.send_multipart([bytes(frame) for frame in encode(m.Heartbeat(count=0), epoch=0)])
        assert receive(server, wake)[0] == "node-1"
        server.send("node-2", COMPUTE, epoch=0, blobs=[ROWS_TH])
        assert receive(true, wake)[1].message == COMPUTE
        server.send("node-1", COMPUTE, epoch=0, blobs=[ROWS_TH])
        assert impostor.poll(int(DEADLINE_S * 1000)), "what is sent to its own name it gets"


def test_with_keys_a_peer_is_reached_where_it_spoke_last(wiring: Wiring, cluster_keys: Path, wake: Wake) -> None:
    server = wiring.router(own=CurveKeys.load(cluster_keys, name="server"))
    own = CurveKeys.load(cluster_keys, name="node-1")
    for _ in range(2):  # the second while the first connection still stands
        node = wiring.dealer(server.endpoint, own=own)
        hello(node)
        assert receive(server, wake)[0] == "node-1"
        server.send("node-1", COMPUTE, epoch=0, blobs=[ROWS_TH])
        assert receive(node, wake)[1].message == COMPUTE
