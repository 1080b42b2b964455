"""A real node agent without threads, on loopback links, with a scripted server and predictor at the other ends."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from odmoe_model.store import ExpertStore
from odmoe_model.tensors import from_blob, to_blob
from odmoe_node.bank import SlotBank, open_bank
from odmoe_node.build import hello_of, limits_of
from odmoe_node.driver import NodeAgent
from odmoe_wire.codec import Received
from odmoe_wire.loopback import LoopbackNetwork
from odmoe_wire.messages import (
    AnyMessage,
    Compute,
    Member,
    Result,
    Schedule,
    Span,
    ToNode,
    ToPredictor,
    ToServer,
    View,
    Welcome,
)

HEARTBEAT_S, LOST_AFTER_S = 1.0, 5.0


class NodeOnLoopback:
    """The node is `n`; what the server and the predictor receive is kept in `at_server` and `at_predictor`."""

    def __init__(self, store_path: Path, *, num_slots: int, joined: bool = True, bank: SlotBank | None = None) -> None:
        self.store = ExpertStore.open(store_path, verify=False)
        manifest, limits = self.store.manifest, limits_of(self.store.manifest)
        self.network = LoopbackNetwork()
        self.server = self.network.router("server", accept=ToServer, limits=limits)
        self.predictor = self.network.router("predictor", accept=ToPredictor, limits=limits)
        self.bank = bank or open_bank(self.store, num_slots=num_slots, device="cpu")
        self.hello = hello_of(manifest, node_id="n", slots=num_slots, budget_bytes=num_slots * manifest.record_bytes)
        self.agent = NodeAgent(
            self.hello,
            bank=self.bank,
            server=self.network.dealer("n", "server", accept=ToNode, limits=limits),
            predictor=self.network.dealer("n", "predictor", accept=ToNode, limits=limits),
            clock=self.network.clock,
            threads=False,
        )
        self.at_server: list[Received] = []
        self.at_predictor: list[AnyMessage] = []
        self.pump()
        if joined:
            self.welcome(epoch=1)

    def welcome(self, *, epoch: int) -> None:
        for link in (self.server, self.predictor):
            link.send("n", Welcome(heartbeat_s=HEARTBEAT_S, lost_after_s=LOST_AFTER_S), epoch=epoch)
        self.server.send("n", View(members=[Member("n", self.hello.slots)], group_size=1), epoch=epoch)
        self.pump()

    def pump(self) -> None:
        """Let the node work until nothing waits; collect what it said."""
        while self.agent.pump(self.network.clock()):
            self.agent.state.check_integrity()
        while (item := self.server.receive()) is not None:
            self.at_server.append(item[1])
        while (item := self.predictor.receive()) is not None:
            self.at_predictor.append(item[1].message)

    def advance(self, seconds: float) -> None:
        self.network.advance(seconds)
        self.pump()

    def forecast(self, layer: int, experts: Sequence[int], *, position: int = 0) -> None:
        self.predictor.send("n", Schedule(span=Span(1, position), layer=layer, experts=list(experts)), epoch=1)
        self.pump()

    def tell(self, message: AnyMessage, *, epoch: int = 1) -> None:
        self.server.send("n", message, epoch=epoch)
        self.pump()

    def compute(
        self,
        layer: int,
        rows: dict[int, Tensor],
        *,
        request_id: int = 0,
        position: int = 0,
        spans: Sequence[Span] = (),
        runs: Sequence[int] = (),
        ttl_s: float = 10.0,
    ) -> None:
        """`rows` maps experts to their x_NH."""
        message = Compute(
            request_id=request_id,
            spans=list(spans) or [Span(1, position)],
            layer=layer,
            experts=list(rows),
            counts=[x_NH.shape[0] for x_NH in rows.values()],
            ttl_s=ttl_s,
            runs=list(runs),
        )
        self.server.send("n", message, epoch=1, blobs=[to_blob(torch.cat(list(rows.values())))])
        self.pump()

    def said(self, kind: type[AnyMessage]) -> list[AnyMessage]:
        """What the server has of one kind."""
        return [received.message for received in self.at_server if isinstance(received.message, kind)]

    def result_rows(self) -> Tensor:
        """Rows of the last result."""
        received = [received for received in self.at_server if isinstance(received.message, Result)][-1]
        return from_blob(received.blobs[0])
