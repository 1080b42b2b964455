"""Which experts of a prompt are loaded before its gates have spoken. Pure: no socket, clock or tensor.

Nearly all experts of a layer are needed by a long prompt (OD-MoE section 3.3), and each is dealt to the same node
whichever they are. So the nodes are told of a layer's experts as soon as all of the layer before is on its way to them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from odmoe_server.cluster.events import Action, LayerCall, Send
from odmoe_server.cluster.peers import ClusterConfig
from odmoe_wire.homes import homes
from odmoe_wire.messages import Load, Member, Release, Span
from odmoe_wire.placement import deal_prompt

# From this share of a layer's experts on, all of them are loaded.
LOAD_AHEAD_SHARE = 0.75


@dataclass(kw_only=True)
class PromptLoads:
    """Every method returns what is to be sent."""

    config: ClusterConfig
    # The layer the nodes were told of last, by the span it is for.
    _told: dict[Span, int] = field(default_factory=dict)

    def begin(self, spans: tuple[Span, ...], members: Sequence[Member], *, epoch: int) -> list[Action]:
        """A prompt begins: its first layer, if with so many tokens most experts can be expected to be chosen."""
        num_tokens = sum(span.length for span in spans)
        left_out = (1.0 - self.config.top_k / self.config.num_experts) ** num_tokens
        return self._load(spans, 0, members, epoch=epoch) if left_out <= 1.0 - LOAD_AHEAD_SHARE else []

    def after(self, call: LayerCall, members: Sequence[Member], *, epoch: int) -> list[Action]:
        """All computes of a prompt's layer are sent: the next layer's loads, which for the last one are those of the
        prompt's next chunk; and what the gate did not choose need not be loaded."""
        actions: list[Action] = []
        if call.layer in [self._told.pop(span, None) for span in call.spans]:
            actions += self._release(call, members, epoch=epoch)
        if len(call.counts) < LOAD_AHEAD_SHARE * self.config.num_experts:
            return actions
        if call.layer + 1 < self.config.num_layers:
            return actions + self._load(call.spans, call.layer + 1, members, epoch=epoch)
        return actions + (self._load(call.next_spans, 0, members, epoch=epoch) if call.next_spans else [])

    def forget(self, sequence: int) -> None:
        """The sequence is over."""
        self._told = {span: layer for span, layer in self._told.items() if span.sequence != sequence}

    def _load(self, spans: tuple[Span, ...], layer: int, members: Sequence[Member], *, epoch: int) -> list[Action]:
        self._told.update(dict.fromkeys(spans, layer))
        by_node: dict[str, list[int]] = {}
        for expert, node_id in deal(layer, range(self.config.num_experts), members, self.config).items():
            by_node.setdefault(node_id, []).append(expert)
        return [
            Send(peer_id=node_id, message=Load(spans=list(spans), layer=layer, experts=experts), epoch=epoch)
            for node_id, experts in sorted(by_node.items())
        ]

    def _release(self, call: LayerCall, members: Sequence[Member], *, epoch: int) -> list[Action]:
        unchosen = set(range(self.config.num_experts)) - set(call.counts)
        holders = set(deal(call.layer, unchosen, members, self.config).values())
        release = Release(spans=list(call.spans), layer=call.layer)
        return [Send(peer_id=node_id, message=release, epoch=epoch) for node_id in sorted(holders)]


def deal(layer: int, experts: Iterable[int], members: Sequence[Member], config: ClusterConfig) -> dict[int, str]:
    """Which of all workers computes an expert of a prompt, whatever else the prompt needs."""
    return deal_prompt(experts, members) if config.mode == "on-demand" else homes(layer, experts, members)
