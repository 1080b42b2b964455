"""A predictor on the loopback network with a server and node agents that say what they are told to."""

from collections.abc import Sequence

from odmoe_model.store import ExpertStore
from odmoe_model.tensors import to_blob
from odmoe_predictor.driver import Predictor
from odmoe_predictor.shadow import Shadow
from odmoe_predictor.switchboard import FromNode, FromServer
from odmoe_wire.checks import Limits
from odmoe_wire.codec import Blob
from odmoe_wire.loopback import LoopbackLink, LoopbackNetwork
from odmoe_wire.messages import (
    Align,
    AnyMessage,
    Heartbeat,
    Hello,
    Member,
    Schedule,
    Start,
    ToNode,
    ToServer,
    View,
    Welcome,
)
from support.predictor_plain import FullModel

HEARTBEAT_S = 0.25
LOST_AFTER_S = 1.5
LIMITS = Limits()


class PredictorRig:
    """`server` and `nodes` are the scripted ends; `took` collects what each of them received."""

    def __init__(
        self, shadow: Shadow, *, node_ids: Sequence[str] = (), run_ahead: int = 0, num_layers: int = 0
    ) -> None:
        self.network = LoopbackNetwork()
        self.epoch = 5
        self.server = self._new_server()
        self.predictor = Predictor(
            Hello(role="predictor", peer_id="predictor", incarnation=0, package_version="0", store_digest="d"),
            shadow,
            server=self.network.dealer("predictor", "server", accept=FromServer, limits=LIMITS),
            nodes=self.network.router("predictor", accept=FromNode, limits=LIMITS),
            num_layers=num_layers,
            run_ahead=run_ahead,
            clock=self.network.clock,
        )
        self.nodes = {
            node_id: self.network.dealer(node_id, "predictor", accept=ToNode, limits=LIMITS) for node_id in node_ids
        }
        self.took: dict[str, list[AnyMessage]] = {"server": [], **{node_id: [] for node_id in node_ids}}
        self.epochs: list[int] = []

    def _new_server(self) -> LoopbackLink:
        return self.network.router("server", accept=ToServer, limits=LIMITS)

    def restart_server(self) -> None:
        """A server that has forgotten everything, at the same address."""
        self.server.close()
        self.server = self._new_server()

    def pump(self, *, seconds: float = 0.0, alive: bool = True) -> None:
        """Let time pass in small steps; with `alive`, server and nodes send life signs meanwhile."""
        steps = max(1, round(seconds / 0.1))
        for _ in range(steps):
            self.network.advance(seconds / steps)
            if alive and seconds:
                self.say(Heartbeat(count=0))
                for node in self.nodes.values():
                    node.send("predictor", Heartbeat(count=0), epoch=self.epoch)
            while self.predictor.pump(self.network.clock()):
                pass
            self._collect()

    def say(self, message: AnyMessage, *, blobs: Sequence[Blob] = ()) -> None:
        """The server sends a message."""
        self.server.send("predictor", message, epoch=self.epoch, blobs=blobs)

    def join(self) -> None:
        """Welcome the predictor and let all nodes join it; they make up the view, in groups of two."""
        self.pump()
        assert any(isinstance(message, Hello) for message in self.took["server"])
        self.say(Welcome(heartbeat_s=HEARTBEAT_S, lost_after_s=LOST_AFTER_S))
        self.say(View(members=[Member(node_id, 4) for node_id in sorted(self.nodes)], group_size=2))
        for node_id in self.nodes:
            self.hello(node_id)
        self.pump()

    def started(self, store: ExpertStore, prompt: list[int]) -> tuple[FullModel, int]:
        """The full model after the prompt, and its next token; sequence 1 has begun."""
        full = FullModel(store)
        token = full.step(prompt)
        self.say(Start(sequence=1))
        return full, token

    def hello(self, node_id: str) -> None:
        """A node says hello to the predictor."""
        message = Hello(role="node", peer_id=node_id, incarnation=1, package_version="0", store_digest="d", slots=4)
        self.nodes[node_id].send("predictor", message, epoch=0)

    def align(self, full: FullModel, token: int, *, rows: int, sequence: int = 1) -> None:
        """The server aligns the sequence with the full model's newest rows and its next token."""
        layers, tensors = full.export(rows)
        message = Align(sequence=sequence, position=full.length, tokens=[token], cache=layers)
        self.say(message, blobs=[to_blob(tensor) for tensor in tensors])

    def schedules(self, receiver: str) -> list[Schedule]:
        """Take the schedules a receiver got."""
        schedules = [message for message in self.took[receiver] if isinstance(message, Schedule)]
        self.took[receiver] = [message for message in self.took[receiver] if not isinstance(message, Schedule)]
        return schedules

    def _collect(self) -> None:
        for name, link in {"server": self.server, **self.nodes}.items():
            while (item := link.receive()) is not None:
                self.took[name].append(item[1].message)
                if isinstance(item[1].message, Schedule):
                    self.epochs.append(item[1].epoch)
