"""The MoE layer's experts as the server's model sees them: token rows go out to the nodes, outputs come back.

Knows the seam into transformers and the cluster; knows no sequence beyond its span. The gate has decided before we
are called, so nothing here can change an answer.

T token rows of the step, K experts a token, N rows of one expert, H hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from odmoe_model.seam import ExpertsCall, combine, group_rows
from odmoe_model.tensors import to_blob
from odmoe_server.cluster.calls import PendingCall
from odmoe_server.cluster.driver import ClusterDriver
from odmoe_server.cluster.events import LayerCall
from odmoe_server.engine_api import ExpertStats
from odmoe_server.moe.trace import RoutedCall
from odmoe_wire.messages import Routed, Span, Wants


@dataclass(kw_only=True)
class Tally:
    """Running counts behind `ExpertStats`."""

    activations: int = 0
    predicted: int = 0
    hit: int = 0
    late: int = 0
    missed: int = 0
    wait_s: float = 0.0
    stall_s: float = 0.0

    def add(self, pending: PendingCall) -> None:
        """Count one served call."""
        self.activations += len(pending.call.counts)
        self.predicted += sum(expert in pending.predicted for expert in pending.call.counts)
        for timing in pending.timings:
            self.hit += timing.outcome == "hit"
            self.late += timing.outcome == "late"
            self.missed += timing.outcome == "miss"
            self.wait_s += timing.wait_s
        self.stall_s += max((timing.wait_s for timing in pending.timings), default=0.0)

    def stats(self) -> ExpertStats:
        """A snapshot."""
        return ExpertStats(
            activations=self.activations,
            predicted=self.predicted,
            hit=self.hit,
            late=self.late,
            missed=self.missed,
            wait_s=self.wait_s,
            stall_s=self.stall_s,
        )


@dataclass(kw_only=True)
class RemoteExperts:
    """Handler of the experts seam. The decode loop sets what follows `trace` before each forward; a prompt has no
    tallies, and is not traced."""

    cluster: ClusterDriver
    trace: Callable[[RoutedCall], None] | None = None
    spans: tuple[Span, ...] = ()
    is_prompt: bool = False
    next_spans: tuple[Span, ...] = ()
    wants: Wants = "cache"
    tallies: tuple[Tally, ...] = field(default_factory=tuple)

    def __call__(self, call: ExpertsCall) -> torch.Tensor:
        """out_TH of one MoE layer. Raises CallError when the cluster cannot serve it."""
        groups = group_rows(call.index_TK)
        rows = {expert: call.x_TH[token_idx] for expert, (token_idx, _) in groups.items()}
        layer_call = LayerCall(
            call_id=self.cluster.next_call_id(),
            spans=self.spans,
            layer=call.layer,
            counts={expert: x_NH.shape[0] for expert, x_NH in rows.items()},
            is_prompt=self.is_prompt,
            next_spans=self.next_spans,
        )
        timeline = self.cluster.timeline
        began_s = 0.0 if timeline is None else timeline.clock()
        pending = self.cluster.submit(layer_call, rows)
        self._tell(call, sorted(groups))
        self.cluster.await_call(pending)
        if timeline is not None:
            timeline.called(
                began_s,
                call=layer_call,
                predicted=pending.predicted,
                timings=pending.timings,
                is_prompt=self.is_prompt,
            )
        if self.trace is not None and self.tallies:
            self.trace(RoutedCall(self.spans, call.layer, call.index_TK, call.weight_TK, pending.predicted))
        for tally in self.tallies:
            tally.add(pending)
        return combine(call.x_TH, call.weight_TK, groups, pending.outputs)

    def _tell(self, call: ExpertsCall, experts: list[int]) -> None:
        """Let a predictor that goes by routings, or corrects by them, hear this one while the nodes are at it."""
        if self.wants == "cache":
            return
        (span,) = self.spans
        # A copy: a blob lends its memory, and the model may go on in place.
        blobs = [] if self.wants == "routings" else [to_blob(call.x_TH.clone())]
        self.cluster.post(Routed(span=span, layer=call.layer, experts=experts), blobs=blobs)
