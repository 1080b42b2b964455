"""A scripted server on a real socket, for node agents in threads and processes."""

import time

import torch
import zmq
from torch import Tensor

from odmoe_model.store import ExpertStore
from odmoe_model.tensors import from_blob, to_blob
from odmoe_node.build import limits_of
from odmoe_wire.codec import Received
from odmoe_wire.link import RouterLink
from odmoe_wire.messages import AnyMessage, Compute, Hello, Member, Span, ToServer, View, Welcome
from odmoe_wire.waiting import Wake, wait

PATIENCE_S = 60.0


class ScriptedServer:
    """Welcomes nodes and sends them what a test tells it to; everything it hears is in `heard`."""

    def __init__(self, endpoint: str, store: ExpertStore, *, context: "zmq.Context[zmq.Socket[bytes]]") -> None:
        self.link = RouterLink.bind(endpoint, context=context, accept=ToServer, limits=limits_of(store.manifest))
        self.heard: list[tuple[str, Received]] = []
        self._wake = Wake()
        self._read = 0

    def close(self) -> None:
        self.link.close()
        self._wake.close()

    def expect(self, kind: type[AnyMessage], *, node_id: str | None = None) -> tuple[str, Received]:
        """The next message of a kind, of those not yet looked at; fails after `PATIENCE_S`."""
        until_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < until_s:
            while self._read < len(self.heard):
                self._read += 1
                peer_id, received = self.heard[self._read - 1]
                if isinstance(received.message, kind) and node_id in (None, peer_id):
                    return peer_id, received
            wait([self.link], self._wake, timeout_s=0.1)
            while (item := self.link.receive()) is not None:
                self.heard.append(item)
        raise AssertionError(f"no {kind.__name__} came; heard {[type(r.message).__name__ for _, r in self.heard]}")

    def admit(self, *node_ids: str, heartbeat_s: float = 0.05) -> None:
        """Wait for each node's hello, then welcome all."""
        hellos = {node_id: self.expect(Hello, node_id=node_id)[1].message for node_id in node_ids}
        members = [Member(node_id, hello.slots) for node_id, hello in hellos.items() if isinstance(hello, Hello)]
        for node_id in node_ids:
            self.link.send(node_id, Welcome(heartbeat_s=heartbeat_s, lost_after_s=30.0), epoch=1)
            self.link.send(node_id, View(members=members, group_size=1), epoch=1)

    def compute(self, node_id: str, layer: int, expert: int, x_NH: Tensor, *, request_id: int) -> None:
        compute = Compute(
            request_id=request_id,
            spans=[Span(1, request_id)],
            layer=layer,
            experts=[expert],
            counts=[x_NH.shape[0]],
            ttl_s=PATIENCE_S,
        )
        self.link.send(node_id, compute, epoch=1, blobs=[to_blob(x_NH)])


def rows_of(received: Received) -> Tensor:
    """The rows of a result."""
    return from_blob(received.blobs[0])


def random_rows(count: int) -> Tensor:
    """x_NH for the tiny models."""
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(count))
