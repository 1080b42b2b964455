"""The file that tells health checks of a life."""

from pathlib import Path

import pytest

from odmoe_wire.checks import Limits
from odmoe_wire.link import Link, PeerGone
from odmoe_wire.loopback import LoopbackNetwork
from odmoe_wire.messages import Cancel, Heartbeat, LoadFailed, ToNode, ToServer
from odmoe_wire.pulse import PulsingLink


@pytest.fixture
def network() -> LoopbackNetwork:
    return LoopbackNetwork()


def pulsing(network: LoopbackNetwork, file: Path) -> PulsingLink:
    return PulsingLink(network.dealer("n", "server", accept=ToNode, limits=Limits()), file=file)


def test_a_heartbeat_that_leaves_touches_the_file_and_nothing_else_does(
    network: LoopbackNetwork, tmp_path: Path
) -> None:
    file = tmp_path / "alive"
    link: Link = pulsing(network, file)
    with pytest.raises(PeerGone):
        link.send("server", Heartbeat(count=1), epoch=0)
    assert not file.exists(), "nobody was there to hear it"
    server = network.router("server", accept=ToServer, limits=Limits())
    link.send("server", LoadFailed(layer=0, expert=0, reason="no memory"), epoch=0)
    assert not file.exists()
    link.send("server", Heartbeat(count=1), epoch=0)
    assert file.exists()
    assert [received[1].message for _ in range(2) if (received := server.receive())][1] == Heartbeat(count=1)
    server.send("n", Cancel(sequence=1), epoch=0)
    assert link.receive() is not None
    assert (link.socket, link.protocol_errors) == (None, 0)
    link.close()
    assert not file.exists()


def test_a_file_that_cannot_be_is_told_once(
    network: LoopbackNetwork, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    link = pulsing(network, tmp_path / "nowhere" / "alive")
    network.router("server", accept=ToServer, limits=Limits())
    for count in range(3):
        link.send("server", Heartbeat(count=count), epoch=0)
    assert len([record for record in caplog.records if "health file" in record.message]) == 1
    link.close()
