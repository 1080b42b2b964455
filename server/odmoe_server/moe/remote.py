"""A MoE layer's experts as the server's model sees them: token rows go out to the nodes, outputs come back.

Knows lanes, the seam into transformers and the cluster; knows no request. The gates have decided before we are called,
so nothing here can change an answer, unless `importance` is there to.

T token rows of a lane, K experts a token, N rows of one expert, H hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from odmoe_model.seam import ExpertsCall, Groups, combine, group_rows
from odmoe_model.tensors import to_blob
from odmoe_server.cluster.calls import PendingCall
from odmoe_server.cluster.driver import ClusterDriver
from odmoe_server.cluster.events import LayerCall
from odmoe_server.importance.mode import Importance
from odmoe_server.importance.orders import Orders
from odmoe_server.moe.lanes import Lane
from odmoe_server.moe.tally import Tally
from odmoe_server.moe.trace import RoutedCall
from odmoe_wire.messages import Routed


@dataclass(kw_only=True)
class _Meeting:
    """A layer of a step while the nodes are at it: the choices that are served, their rows by lane and expert, and what
    is computed here meanwhile."""

    orders: Orders | None
    served: Sequence[ExpertsCall]
    groups: Sequence[Groups]
    rows: dict[int, torch.Tensor]
    runs: dict[int, list[int]]
    pending: PendingCall
    hosted: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass(kw_only=True)
class RemoteExperts:
    """Serves a layer's experts to all lanes of a step. With `traces`, what the gates chose is left in the lanes.
    `importance` lets other experts stand in for some of those. `expert_bytes`: what a load of one copies."""

    cluster: ClusterDriver
    traces: bool = False
    importance: Importance | None = None
    expert_bytes: int = 0
    total: Tally = field(default_factory=Tally)

    def __call__(self, lanes: Sequence[Lane], calls: Sequence[ExpertsCall]) -> list[torch.Tensor]:
        """out_TH for each lane. Raises CallError when the cluster cannot serve the layer."""
        orders = None if self.importance is None else self.importance.choose(lanes, calls)
        timeline = self.cluster.timeline
        began_s = 0.0 if timeline is None else timeline.clock()
        meeting = self._begin(lanes, calls, orders)
        for lane, call in zip(lanes, calls, strict=True):
            self._tell(lane, call)
        if self.importance is not None:
            meeting = self._serve_at_hand(self.importance, lanes, calls, meeting)
        pending = self.cluster.await_call(meeting.pending)
        pending.outputs.update(meeting.hosted)
        if timeline is not None:
            timeline.called(
                began_s,
                call=pending.call,
                predicted=pending.predicted,
                timings=pending.timings,
                is_prompt=pending.call.is_prompt,
            )
        self._count(lanes, meeting.groups, pending, meeting.orders)
        if self.traces:
            _trace(lanes, calls, pending)
        for lane, served in zip(lanes, meeting.served, strict=True):
            if lane.served is not None:
                lane.served.append(served.index_TK)
        return _combine(meeting.served, meeting.groups, pending, meeting.runs)

    def _begin(self, lanes: Sequence[Lane], calls: Sequence[ExpertsCall], orders: Orders | None) -> _Meeting:
        """Let the nodes compute what the lanes are served with."""
        served = calls if orders is None else orders.calls
        groups = [group_rows(call.index_TK) for call in served]
        rows, runs = _gather(served, groups)
        layer_call = self._layer_call(lanes, calls[0].layer, rows, runs, orders)
        pending = self.cluster.submit(layer_call, rows)
        return _Meeting(orders=orders, served=served, groups=groups, rows=rows, runs=runs, pending=pending)

    def _serve_at_hand(
        self, importance: Importance, lanes: Sequence[Lane], calls: Sequence[ExpertsCall], meeting: _Meeting
    ) -> _Meeting:
        """Compute the host's share beside the nodes. Where one of these is late, and what it has can be replaced, the
        layer is begun anew without it: the others have what they computed in their slots."""
        assert meeting.orders is not None, "they come with the mode"
        importance.fetch_ahead(lanes, meeting.orders)
        meeting.hosted = importance.host_rows(meeting.orders, meeting.rows, meeting.runs)
        patience_s = importance.patience_s(lanes, meeting.orders)
        if patience_s is None or self.cluster.await_for(meeting.pending, timeout_s=patience_s):
            return meeting
        late = meeting.pending.call.counts.keys() - meeting.pending.outputs.keys()
        orders = importance.without(lanes, calls, meeting.orders, late=late)
        if orders is None:
            return meeting
        self.cluster.give_up(meeting.pending)
        meeting = self._begin(lanes, calls, orders)
        meeting.hosted = importance.host_rows(orders, meeting.rows, meeting.runs)
        return meeting

    def _layer_call(
        self,
        lanes: Sequence[Lane],
        layer: int,
        rows: dict[int, torch.Tensor],
        runs: dict[int, list[int]],
        orders: Orders | None,
    ) -> LayerCall:
        host = () if orders is None else orders.host
        return LayerCall(
            call_id=self.cluster.next_call_id(),
            spans=tuple(lane.span for lane in lanes),
            layer=layer,
            counts={expert: x_NH.shape[0] for expert, x_NH in rows.items() if expert not in host},
            runs={expert: tuple(lengths) for expert, lengths in runs.items()} if len(lanes) > 1 else {},
            is_prompt=lanes[0].is_prompt,
            next_spans=tuple(lane.next_span for lane in lanes if lane.next_span is not None),
            where={} if orders is None else orders.where,
            leaving={} if orders is None else orders.leaving,
        )

    def _count(
        self, lanes: Sequence[Lane], groups: Sequence[Groups], pending: PendingCall, orders: Orders | None
    ) -> None:
        """The total counts each expert of the step once, a sequence each expert of its own lanes once."""
        needed: dict[int, tuple[Tally, set[int]]] = {}
        for lane, own in zip(lanes, groups, strict=True):
            for tally in lane.tallies:
                needed.setdefault(id(tally), (tally, set()))[1].update(own)
        if needed:
            needed[id(self.total)] = self.total, set().union(*groups)
        for tally, experts in needed.values():
            tally.add(experts, predicted=pending.predicted, timings=pending.timings, expert_bytes=self.expert_bytes)
        if orders is not None:
            self._count_replaced(lanes, orders, layer=pending.call.layer)

    def _count_replaced(self, lanes: Sequence[Lane], orders: Orders, *, layer: int) -> None:
        """As the activations are counted: once a step and sequence, and once a step."""
        counted: dict[int, tuple[Tally, set[int]]] = {}
        for lane, replaced in zip(lanes, orders.replaced, strict=True):
            for tally in (*lane.tallies, self.total):
                counted.setdefault(id(tally), (tally, set()))[1].update(replaced)
        for tally, experts in counted.values():
            tally.substituted += len(experts)
            if tally is self.total:
                self.cluster.state.ledger.replaced(layer, len(experts))

    def _tell(self, lane: Lane, call: ExpertsCall) -> None:
        """Let a predictor that goes by routings, or corrects by them, hear this one while the nodes are at it."""
        if lane.wants == "cache":
            return
        # A copy: a blob lends its memory, and the model may go on in place.
        blobs = [] if lane.wants == "routings" else [to_blob(call.x_TH.clone())]
        experts = sorted({expert for row in call.index_TK.tolist() for expert in row})
        self.cluster.post(Routed(span=lane.span, layer=call.layer, experts=experts), blobs=blobs)


def _trace(lanes: Sequence[Lane], calls: Sequence[ExpertsCall], pending: PendingCall) -> None:
    for lane, call in zip(lanes, calls, strict=True):
        if lane.tallies:
            lane.routed.append(RoutedCall((lane.span,), call.layer, call.index_TK, call.weight_TK, pending.predicted))


def _gather(
    calls: Sequence[ExpertsCall], groups: Sequence[Groups]
) -> tuple[dict[int, torch.Tensor], dict[int, list[int]]]:
    """Each expert's rows of all lanes, in the order of lanes, and how many of them each lane has that has any."""
    parts: dict[int, list[torch.Tensor]] = {}
    for call, own in zip(calls, groups, strict=True):
        for expert, (token_N, _) in own.items():
            parts.setdefault(expert, []).append(call.x_TH[token_N])
    rows = {expert: part[0] if len(part) == 1 else torch.cat(part) for expert, part in parts.items()}
    return rows, {expert: [x_NH.shape[0] for x_NH in part] for expert, part in parts.items()}


def _combine(
    calls: Sequence[ExpertsCall], groups: Sequence[Groups], pending: PendingCall, runs: dict[int, list[int]]
) -> list[torch.Tensor]:
    """What belongs to each lane, weighed and added as if it were alone."""
    if len(calls) == 1:
        return [combine(calls[0].x_TH, calls[0].weight_TK, groups[0], pending.outputs)]
    pieces = {expert: iter(torch.split(y_NH, runs[expert])) for expert, y_NH in pending.outputs.items()}
    outputs = []
    for call, own in zip(calls, groups, strict=True):
        mine = {expert: next(pieces[expert]) for expert in own}
        outputs.append(combine(call.x_TH, call.weight_TK, own, mine))
    return outputs
