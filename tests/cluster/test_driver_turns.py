"""The cluster's driver shares its turns out: a flood of messages does not keep it from calls, time and life signs."""

from odmoe_server.cluster.driver import MAX_BURST, ClusterDriver
from odmoe_server.cluster.peers import ClusterConfig
from odmoe_server.cluster.state import ClusterState
from odmoe_wire.checks import Limits
from odmoe_wire.codec import Received
from odmoe_wire.loopback import LoopbackNetwork
from odmoe_wire.messages import Heartbeat, Span, ToServer

CONFIG = ClusterConfig(store_digest="d", package_version="0", num_layers=4, num_experts=8, group_size=2)


class Flood:
    """A link on which there is always one more message."""

    socket = None
    protocol_errors = 0

    def __init__(self, network: LoopbackNetwork) -> None:
        self._link = network.router("server", accept=ToServer, limits=Limits())
        self.bad_messages = self._link.bad_messages
        self.send, self.close = self._link.send, self._link.close
        self.received = 0

    def receive(self) -> tuple[str, Received]:
        self.received += 1
        assert self.received < 100 * MAX_BURST, "it never did anything else"
        return "n", Received(message=Heartbeat(count=self.received), epoch=0, blobs=())


def test_a_flood_of_messages_lets_others_have_their_turn() -> None:
    network = LoopbackNetwork()
    flood = Flood(network)
    driver = ClusterDriver(ClusterState(config=CONFIG), link=flood, clock=network.clock)
    network.advance(1.0)
    driver.begin_prompt((Span(1, 0),))
    assert driver.pump(network.clock())
    assert flood.received == MAX_BURST
    assert not driver._inbox
    assert driver._next_tick_s > network.clock(), "it heard of the time"
    assert driver._wake._is_set, "there may be more"
