"""Drafts as the decode loop's thread sees them: there at once when known, and gone with their predictor."""

import pytest

from odmoe_server.cluster.driver import ClusterDriver
from odmoe_server.cluster.peers import ClusterConfig
from odmoe_server.cluster.state import ClusterState
from odmoe_wire.checks import Limits
from odmoe_wire.loopback import LoopbackNetwork
from odmoe_wire.messages import AnyMessage, Bye, Hello, Rollback, Schedule, Span, ToPredictor, ToServer

CONFIG = ClusterConfig(store_digest="d", package_version="0", num_layers=4, num_experts=8, group_size=2)


class Server:
    """A driver with a scripted predictor and a scripted stranger, a node; pumped by hand."""

    def __init__(self) -> None:
        self.network = LoopbackNetwork()
        link = self.network.router("server", accept=ToServer, limits=Limits())
        self.driver = ClusterDriver(ClusterState(config=CONFIG), link=link, clock=self.network.clock)
        self._links = {
            name: self.network.dealer(name, "server", accept=ToPredictor, limits=Limits()) for name in ("p", "n")
        }
        self.hear(
            Hello(role="node", peer_id="n", incarnation=1, package_version="0", store_digest="d", slots=1), by="n"
        )
        self.begin(1)

    def begin(self, incarnation: int) -> None:
        """The predictor says hello."""
        self.hear(Hello(role="predictor", peer_id="p", incarnation=incarnation, package_version="0", store_digest="d"))

    def hear(self, message: AnyMessage, *, by: str = "p", epoch: int | None = None) -> None:
        """A peer sends something, and it arrives."""
        at = self.driver.state.peers.epoch if epoch is None else epoch
        self._links[by].send("server", message, epoch=at)
        self.driver.pump(self.network.clock())

    def drafts(self) -> tuple[int, ...]:
        return self.driver.drafts(1, 10, 8)


@pytest.fixture(name="server")
def new_server() -> Server:
    return Server()


def said(position: int, *tokens: int) -> Schedule:
    return Schedule(span=Span(1, position, len(tokens)), layer=0, experts=[1], tokens=list(tokens))


def test_drafts_come_with_forecasts_and_go_with_rollbacks_whatever_the_view(server: Server) -> None:
    server.hear(said(10, 5))
    server.hear(said(11, 6), epoch=server.driver.state.peers.epoch + 7)
    assert server.drafts() == (5, 6)
    assert server.driver.state.stale_total == 1
    server.hear(Rollback(sequence=1, position=11), epoch=server.driver.state.peers.epoch + 7)
    assert server.drafts() == (5,)
    server.driver.end_sequence(1)
    server.driver.pump(server.network.clock())
    assert server.drafts() == ()


def test_a_node_has_no_say_in_drafts(server: Server) -> None:
    server.hear(said(10, 5), by="n")
    assert server.drafts() == ()


@pytest.mark.parametrize("how", ["bye", "restart"])
def test_drafts_of_a_predictor_that_is_gone_are_forgotten(server: Server, how: str) -> None:
    server.hear(said(10, 5))
    server.hear(Bye(reason="test"), by="n")
    assert server.drafts() == (5,), "it was only a node"
    if how == "bye":
        server.hear(Bye(reason="test"))
    else:
        server.begin(2)
    assert server.drafts() == ()
