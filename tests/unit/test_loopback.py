"""The loopback network does what it is told to messages, in virtual time, and otherwise behaves as sockets do."""

import pytest

from odmoe_wire import messages as m
from odmoe_wire.codec import Blob, Limits
from odmoe_wire.link import Link, PeerGone
from odmoe_wire.loopback import ALL, LoopbackLink, LoopbackNetwork, ManualClock

LIMITS = Limits()


@pytest.fixture
def network() -> LoopbackNetwork:
    return LoopbackNetwork(ManualClock(start_s=100.0))


@pytest.fixture
def server(network: LoopbackNetwork) -> LoopbackLink:
    return network.router("server", accept=m.ToServer, limits=LIMITS)


@pytest.fixture
def node(network: LoopbackNetwork, server: LoopbackLink) -> LoopbackLink:
    return network.dealer("node-1", "server", accept=m.ToNode, limits=LIMITS)


def beat(link: Link, peer: str, *counts: int) -> None:
    for count in counts:
        link.send(peer, m.Heartbeat(count=count), epoch=0)


def beats(link: Link) -> list[int]:
    """Counts of all heartbeats that have arrived."""
    counts = []
    while (got := link.receive()) is not None:
        assert isinstance(got[1].message, m.Heartbeat)
        counts.append(got[1].message.count)
    return counts


def test_there_and_back_with_blobs(server: LoopbackLink, node: LoopbackLink) -> None:
    beat(node, "server", 1, 2)
    got = server.receive()
    assert got is not None
    assert got[0] == "node-1"
    assert beats(server) == [2]
    data = bytearray(b"12345678")
    message = m.Compute(request_id=1, spans=[m.Span(1, 0)], layer=0, experts=[0], counts=[1], ttl_s=1.0)
    server.send("node-1", message, epoch=4, blobs=[Blob("float32", (1, 2), memoryview(data))])
    data[0] = 0
    got = node.receive()
    assert got is not None
    peer, received = got
    assert (peer, received.epoch, received.message) == ("server", 4, message)
    # As on a socket: the receiver's own memory, which it may write to.
    assert isinstance(received.blobs[0].data, memoryview)
    assert not received.blobs[0].data.readonly
    assert bytes(received.blobs[0].data) == b"12345678"


def test_bad_messages_are_counted_told_and_skipped(server: LoopbackLink, node: LoopbackLink) -> None:
    node.send("server", m.Start(sequence=1), epoch=0)
    beat(node, "server", 3)
    assert beats(server) == [3]
    assert server.protocol_errors == 1
    got = node.receive()
    assert got is not None
    assert isinstance(got[1].message, m.ProtocolErrorNotice)


def test_delay_and_overtaking(network: LoopbackNetwork, server: LoopbackLink, node: LoopbackLink) -> None:
    network.link_fault("node-1", "server", delay_s=2.0)
    beat(node, "server", 1)
    network.link_fault("node-1", "server", delay_s=0.5)
    beat(node, "server", 2)
    assert beats(server) == []
    assert network.next_delivery_s() == 100.5
    network.advance(0.5)
    assert beats(server) == [2]
    network.advance(1.4)
    assert beats(server) == []
    network.advance(0.2)
    assert beats(server) == [1]
    assert network.next_delivery_s() is None
    beat(server, "node-1", 3)
    assert beats(node) == [3]


def test_drop_the_next_or_all_or_some(network: LoopbackNetwork, server: LoopbackLink, node: LoopbackLink) -> None:
    network.link_fault("node-1", "server", drop=2)
    beat(node, "server", 1, 2, 3)
    assert beats(server) == [3]
    network.link_fault("node-1", "server", drop=ALL)
    beat(node, "server", *range(20))
    assert beats(server) == []
    network.link_fault("node-1", "server", drop=lambda message: message == m.Heartbeat(count=2))
    beat(node, "server", 1, 2, 3)
    assert beats(server) == [1, 3]
    network.link_fault("node-1", "server")
    beat(node, "server", 2)
    assert beats(server) == [2]


def test_duplicates(network: LoopbackNetwork, server: LoopbackLink, node: LoopbackLink) -> None:
    network.link_fault("node-1", "server", duplicate=1)
    beat(node, "server", 1, 2)
    assert beats(server) == [1, 1, 2]
    assert [(sent.source, sent.target, sent.copies) for sent in network.story] == [
        ("node-1", "server", 2),
        ("node-1", "server", 1),
    ]


def test_cut_loses_what_is_under_way_and_heals(
    network: LoopbackNetwork, server: LoopbackLink, node: LoopbackLink
) -> None:
    beat(node, "server", 1)
    beat(server, "node-1", 2)
    network.cut("server", "node-1")
    assert beats(server) == beats(node) == []
    with pytest.raises(PeerGone, match="node-1"):
        beat(server, "node-1", 3)
    with pytest.raises(PeerGone, match="server"):
        beat(node, "server", 3)
    network.heal("node-1", "server")
    beat(server, "node-1", 4)
    assert beats(node) == [4]


def test_cut_is_by_direction(network: LoopbackNetwork, server: LoopbackLink, node: LoopbackLink) -> None:
    network.link_fault("server", "node-1", cut=True)
    with pytest.raises(PeerGone):
        beat(server, "node-1", 1)
    beat(node, "server", 2)
    assert beats(server) == [2]


def test_no_route(network: LoopbackNetwork, server: LoopbackLink, node: LoopbackLink) -> None:
    with pytest.raises(PeerGone):
        beat(server, "node-2", 1)
    with pytest.raises(PeerGone):
        beat(node, "predictor", 1)
    early = network.dealer("node-1", "predictor", accept=m.ToNode, limits=LIMITS)
    with pytest.raises(PeerGone):
        beat(early, "predictor", 1)
    predictor = network.router("predictor", accept=m.ToPredictor, limits=LIMITS)
    beat(early, "predictor", 2)
    assert beats(predictor) == [2]


def test_a_full_queue(network: LoopbackNetwork) -> None:
    server = network.router("server", accept=m.ToServer, limits=LIMITS, hwm=3)
    node = network.dealer("node-1", "server", accept=m.ToNode, limits=LIMITS)
    beat(server, "node-1", 1, 2, 3)
    with pytest.raises(PeerGone, match="full"):
        beat(server, "node-1", 4)
    assert beats(node) == [1, 2, 3]
    beat(server, "node-1", 5)
    assert beats(node) == [5]


def test_closing_and_coming_back(network: LoopbackNetwork, server: LoopbackLink, node: LoopbackLink) -> None:
    beat(node, "server", 1)
    beat(server, "node-1", 2)
    node.close()
    node.close()
    with pytest.raises(PeerGone):
        beat(server, "node-1", 3)
    with pytest.raises(PeerGone):
        beat(node, "server", 3)
    assert node.receive() is None
    assert beats(server) == [1]
    again = network.dealer("node-1", "server", accept=m.ToNode, limits=LIMITS)
    assert beats(again) == []
    beat(server, "node-1", 4)
    assert beats(again) == [4]


def test_a_second_dealer_of_a_name_takes_over(
    network: LoopbackNetwork, server: LoopbackLink, node: LoopbackLink
) -> None:
    new = network.dealer("node-1", "server", accept=m.ToNode, limits=LIMITS)
    beat(server, "node-1", 1)
    assert (beats(new), beats(node)) == ([1], [])
    with pytest.raises(PeerGone):
        beat(node, "server", 2)
    node.close()
    beat(server, "node-1", 3)
    assert beats(new) == [3]


def test_a_restarted_router(network: LoopbackNetwork, server: LoopbackLink, node: LoopbackLink) -> None:
    with pytest.raises(ValueError, match="server"):
        network.router("server", accept=m.ToServer, limits=LIMITS)
    beat(node, "server", 1)
    server.close()
    with pytest.raises(PeerGone):
        beat(node, "server", 2)
    again = network.router("server", accept=m.ToServer, limits=LIMITS)
    beat(node, "server", 3)
    assert beats(again) == [3]


def test_one_name_may_be_router_and_dealer(network: LoopbackNetwork, server: LoopbackLink) -> None:
    up = network.dealer("predictor", "server", accept=m.ToPredictor, limits=LIMITS)
    down = network.router("predictor", accept=m.ToPredictor, limits=LIMITS)
    beat(server, "predictor", 1)
    assert (beats(down), beats(up)) == ([], [1])
    beat(up, "server", 2)
    assert beats(server) == [2]


def test_messages_of_several_peers_come_in_order_of_arrival(network: LoopbackNetwork, server: LoopbackLink) -> None:
    one, two = (network.dealer(f"node-{i}", "server", accept=m.ToNode, limits=LIMITS) for i in (1, 2))
    beat(one, "server", 1)
    beat(two, "server", 2)
    beat(one, "server", 3)
    assert beats(server) == [1, 2, 3]


def test_time_does_not_go_back(network: LoopbackNetwork) -> None:
    with pytest.raises(ValueError, match="back"):
        network.advance(-1.0)
