"""The MoE layer's experts as the server's model sees them: token rows go out to the nodes, outputs come back.

Knows the seam into transformers and the cluster; knows no sequence beyond its span. The gate has decided before we
are called, so nothing here can change an answer.

T token rows of the step, K experts a token, N rows of one expert, H hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from odmoe_model.seam import ExpertsCall, combine, group_rows
from odmoe_server.cluster.calls import PendingCall
from odmoe_server.cluster.driver import ClusterDriver
from odmoe_server.cluster.events import LayerCall
from odmoe_server.engine_api import ExpertStats
from odmoe_server.moe.trace import Routed
from odmoe_wire.messages import Span


@dataclass(kw_only=True)
class Tally:
    """Running counts behind `ExpertStats`."""

    activations: int = 0
    predicted: int = 0
    hit: int = 0
    late: int = 0
    missed: int = 0
    wait_s: float = 0.0

    def add(self, pending: PendingCall) -> None:
        """Count one served call."""
        self.activations += len(pending.call.counts)
        self.predicted += sum(expert in pending.predicted for expert in pending.call.counts)
        for timing in pending.timings:
            self.hit += timing.outcome == "hit"
            self.late += timing.outcome == "late"
            self.missed += timing.outcome == "miss"
            self.wait_s += timing.wait_s

    def stats(self) -> ExpertStats:
        """A snapshot."""
        return ExpertStats(
            activations=self.activations,
            predicted=self.predicted,
            hit=self.hit,
            late=self.late,
            missed=self.missed,
            wait_s=self.wait_s,
        )


@dataclass(kw_only=True)
class RemoteExperts:
    """Handler of the experts seam. The decode loop sets `spans` and `tallies` before each forward; a prompt has no
    tallies, and is not traced."""

    cluster: ClusterDriver
    trace: Callable[[Routed], None] | None = None
    spans: tuple[Span, ...] = ()
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
        )
        timeline = self.cluster.timeline
        began_s = 0.0 if timeline is None else timeline.clock()
        pending = self.cluster.await_call(self.cluster.submit(layer_call, rows))
        if timeline is not None:
            timeline.called(
                began_s,
                call=layer_call,
                predicted=pending.predicted,
                timings=pending.timings,
                is_prompt=not self.tallies,
            )
        if self.trace is not None and self.tallies:
            self.trace(Routed(self.spans, call.layer, call.index_TK, call.weight_TK, pending.predicted))
        for tally in self.tallies:
            tally.add(pending)
        return combine(call.x_TH, call.weight_TK, groups, pending.outputs)
