"""The server's and the nodes' pure cores together, with a scripted predictor: steps that verify several tokens.

Nothing takes time and no message is lost or overtaken. Gates and forecasts are drawn from the token of a position, so
guesses that were wrong want experts of their own. Knows no tensors.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from odmoe_server.cluster.events import (
    Action,
    CallRequested,
    LayerCall,
    PartDone,
    PeerMessage,
    Send,
    SendCompute,
    SequenceEnded,
)
from odmoe_server.cluster.peers import ClusterConfig
from odmoe_server.cluster.state import ClusterState
from odmoe_wire.messages import AnyMessage, Hello, Rollback, Schedule, Span, ToNode
from odmoe_wire.placement import place
from odmoe_wire.sharing import Sharing
from support.node_rig import NodeRig

TOP_K = 2
PREDICTOR = "p"


@dataclass
class Told:
    """What the predictor has said of a sequence: position -> the token it forecast it for."""

    tokens: dict[int, int] = field(default_factory=dict)


class Verifying:
    """`wrong` is the share of experts that forecasts get wrong."""

    def __init__(self, config: ClusterConfig, *, num_nodes: int, num_slots: int, wrong: float, seed: int) -> None:
        self.config = config
        self.dice = random.Random(seed)
        self.state = ClusterState(config=config)
        self.nodes = {f"n{index}": NodeRig(num_slots=num_slots, joined=False) for index in range(num_nodes)}
        self.called: list[LayerCall] = []
        self.outcomes: set[str] = set()
        self._wrong = wrong
        self._told: dict[int, Told] = {}
        self._last_call = 0
        self._sharing = Sharing()
        self._parts: list[PartDone] = []
        for peer_id in [*self.nodes, PREDICTOR]:
            self._say(peer_id, _hello(peer_id, config, slots=num_slots), epoch=0)

    # ------------------------------------------------------------------------------------------ what is drawn

    def experts(self, sequence: int, position: int, token: int, layer: int) -> frozenset[int]:
        """What the gate chooses."""
        dice = random.Random(f"{sequence} {position} {token} {layer}")
        return frozenset(dice.sample(range(self.config.num_experts), TOP_K))

    def _guessed(self, experts: Iterable[int]) -> list[int]:
        other = range(self.config.num_experts)
        return sorted({self.dice.choice(other) if self.dice.random() < self._wrong else expert for expert in experts})

    # ------------------------------------------------------------------------------------------- what is done

    def forecast(self, sequence: int, position: int, token: int, *, layers: Iterable[int] | None = None) -> None:
        """The shadow has run a position with a token; where it had run it with another, that is void before."""
        told = self._told.setdefault(sequence, Told()).tokens
        if told.get(position, token) != token:
            self._told[sequence].tokens = told = {at: token for at, token in told.items() if at < position}
            self._spread(Rollback(sequence=sequence, position=position), self.nodes)
        told[position] = token
        for layer in range(self.config.num_layers) if layers is None else layers:
            self._schedule(
                Span(sequence, position), layer, self._guessed(self.experts(sequence, position, token, layer))
            )

    def step(self, blocks: dict[int, tuple[int, Sequence[int]]]) -> None:
        """The full model takes of each sequence these tokens, from the position on, through all layers."""
        spans = [Span(sequence, at + i) for sequence, (at, tokens) in blocks.items() for i in range(len(tokens))]
        tokens = [token for _, block in blocks.values() for token in block]
        for layer in range(self.config.num_layers):
            runs: dict[int, list[int]] = {}
            for span, token in zip(spans, tokens, strict=True):
                for expert in self.experts(span.sequence, span.position, token, layer):
                    runs.setdefault(expert, []).append(1)
            self._call(tuple(spans), layer, runs)

    def end(self, sequence: int) -> None:
        self._act(self.state.handle(SequenceEnded(sequence=sequence), 0.0))
        self._told.pop(sequence, None)
        self.settle()

    def settle(self) -> None:
        """Let all loads and computes end."""
        while any(node.loading or node.computing for node in self.nodes.values()):
            for node_id, node in self.nodes.items():
                node.finish()
                self._hear(node_id, node)

    # ----------------------------------------------------------------------------------------------- insides

    def _call(self, spans: tuple[Span, ...], layer: int, runs: dict[int, list[int]]) -> None:
        self._last_call += 1
        self._parts.clear()
        call = LayerCall(
            call_id=self._last_call,
            spans=spans,
            layer=layer,
            counts={expert: sum(lengths) for expert, lengths in runs.items()},
            runs={expert: tuple(lengths) for expert, lengths in runs.items()},
        )
        self.called.append(call)
        self._act(self.state.handle(CallRequested(call=call), 0.0))
        self.settle()
        assert {expert for part in self._parts for expert in part.wanted} == set(runs), "an expert was not computed"

    def _act(self, actions: Iterable[Action]) -> None:
        for action in actions:
            if isinstance(action, Send | SendCompute) and action.peer_id in self.nodes:
                node = self.nodes[action.peer_id]
                if isinstance(action.message, ToNode):
                    node.tell(action.message, epoch=action.epoch)
                self._hear(action.peer_id, node)
            elif isinstance(action, PartDone):
                self._parts.append(action)
                self.outcomes.update(timing.outcome for timing in action.timings)

    def _hear(self, node_id: str, node: NodeRig) -> None:
        answers, node.answers = node.answers, []
        for message in answers:
            self._say(node_id, message, epoch=self.state.peers.epoch)

    def _say(self, peer_id: str, message: AnyMessage, *, epoch: int) -> None:
        self._act(self.state.handle(PeerMessage(peer_id=peer_id, epoch=epoch, message=message), 0.0))

    def _schedule(self, span: Span, layer: int, experts: list[int]) -> None:
        where = self._dealt(span, layer, experts)
        for node_id in sorted(set(where.values())):
            share = [expert for expert in experts if where[expert] == node_id]
            self._spread(Schedule(span=span, layer=layer, experts=share), [node_id], tell_server=False)
        self._spread(Schedule(span=span, layer=layer, experts=experts), [])

    def _dealt(self, span: Span, layer: int, experts: list[int]) -> dict[int, str]:
        config, members = self.config, self.state.peers.members()
        if config.placing == "span":
            return self._sharing.deal(
                span, layer, experts, members, group_size=config.group_size, num_layers=config.num_layers
            )
        return place(layer, experts, members, config.group_size, config.num_layers, placing=config.placing)

    def _spread(self, message: Schedule | Rollback, node_ids: Iterable[str], *, tell_server: bool = True) -> None:
        epoch = self.state.peers.epoch
        for node_id in node_ids:
            self.nodes[node_id].tell(message, epoch=epoch)
        if tell_server:
            self._say(PREDICTOR, message, epoch=epoch)


def _hello(peer_id: str, config: ClusterConfig, *, slots: int) -> Hello:
    return Hello(
        role="predictor" if peer_id == PREDICTOR else "node",
        peer_id=peer_id,
        incarnation=1,
        package_version=config.package_version,
        store_digest=config.store_digest,
        slots=slots,
        budget_bytes=1,
    )
