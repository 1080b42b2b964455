"""What both show: the engine's health, and how fast its counters grow. Pure: the time comes in.

Knows the health; does not know who looks at it.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from odmoe_server.engine_api import EngineHealth, NodeHealth, Spread

WINDOW_S: Final = 5.0


class NodeLine(msgspec.Struct, frozen=True, kw_only=True):
    """One peer. Rates are over the window; `load_s` and `rpc_s` are means of the window, else of all, else None."""

    id: str
    role: str
    alive: bool
    slots: int
    used_slots: int
    rss_bytes: int
    loads_per_s: float
    load_s: float | None
    rpc_s: float | None
    forecasts_per_s: float
    undelivered: int


class LayerLine(msgspec.Struct, frozen=True):
    """Outcomes of one MoE layer since the start."""

    hit: int
    late: int
    missed: int


class StoryLine(msgspec.Struct, frozen=True):
    """Something that happened."""

    ago_s: float
    text: str


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """One picture. What has not happened yet, and so has no share or mean, is None."""

    version: str
    model: str
    state: str
    detail: str
    window_s: float
    epoch: int
    running: int
    queued: int
    generation_tokens: int
    tokens_per_s: float
    prompt_tokens_per_s: float
    recall: float | None
    recall_lately: float | None
    hit: int
    late: int
    missed: int
    stall_s_per_token: float | None
    loads_per_s: float
    load_s: float | None
    drafted: int
    accepted: int
    kv_bytes: int
    kv_budget_bytes: int
    predictor_alive: bool
    lead_layers: int | None
    realigns: int
    failovers: int
    failures: int
    protocol_errors: int
    nodes: tuple[NodeLine, ...]
    layers: tuple[LayerLine, ...]
    story: tuple[StoryLine, ...]


class Feed:
    """Remembers the healths of the last `WINDOW_S`; one for each who looks."""

    def __init__(self, *, version: str, model: str) -> None:
        self._version = version
        self._model = model
        self._past: deque[tuple[float, EngineHealth]] = deque()

    def status(self, health: EngineHealth, now: float) -> Status:
        """The picture, given that the health is what it is now."""
        self._past.append((now, health))
        while len(self._past) > 2 and now - self._past[1][0] >= WINDOW_S:
            self._past.popleft()
        since_s, before = self._past[0]
        return self._status(health, before, took_s=now - since_s)

    def _status(self, now: EngineHealth, before: EngineHealth, *, took_s: float) -> Status:
        def rate(end: float, begin: float) -> float:
            return max(0.0, end - begin) / took_s if took_s > 0 else 0.0

        earlier = {peer.peer_id: peer for peer in before.nodes}
        pairs = [(peer, earlier.get(peer.peer_id, peer)) for peer in now.nodes]
        nodes = tuple(_line(peer, past, rate) for peer, past in pairs)
        num_tokens = now.generation_tokens_total - before.generation_tokens_total
        stall_s = now.totals.stall_s - before.totals.stall_s
        return Status(
            version=self._version,
            model=self._model,
            state=now.state,
            detail=now.detail,
            window_s=WINDOW_S,
            epoch=now.cluster.epoch,
            running=now.running,
            queued=now.queued,
            generation_tokens=now.generation_tokens_total,
            tokens_per_s=rate(now.generation_tokens_total, before.generation_tokens_total),
            prompt_tokens_per_s=rate(now.prompt_tokens_total, before.prompt_tokens_total),
            recall=_recall(now),
            recall_lately=_recall(now, before),
            hit=now.totals.hit,
            late=now.totals.late,
            missed=now.totals.missed,
            stall_s_per_token=stall_s / num_tokens if num_tokens > 0 else None,
            loads_per_s=sum(node.loads_per_s for node in nodes),
            load_s=_mean([(peer.load_times, past.load_times) for peer, past in pairs]),
            drafted=now.totals.drafted,
            accepted=now.totals.accepted,
            kv_bytes=now.kv_reserved_bytes + now.kv_prefix_bytes,
            kv_budget_bytes=now.kv_budget_bytes,
            predictor_alive=now.predictor_alive,
            lead_layers=now.cluster.lead_layers,
            realigns=now.cluster.realigns_total,
            failovers=now.failovers_total,
            failures=now.failures_total,
            protocol_errors=now.protocol_errors_total,
            nodes=nodes,
            layers=tuple(LayerLine(layer.hit, layer.late, layer.missed) for layer in now.cluster.layers),
            story=tuple(StoryLine(ago_s, text) for ago_s, text in now.cluster.story),
        )


def _line(peer: NodeHealth, past: NodeHealth, rate: Callable[[float, float], float]) -> NodeLine:
    return NodeLine(
        id=peer.peer_id,
        role=peer.role,
        alive=peer.alive,
        slots=peer.slots,
        used_slots=peer.used_slots,
        rss_bytes=peer.rss_bytes,
        loads_per_s=rate(peer.loads_total, past.loads_total),
        load_s=_mean([(peer.load_times, past.load_times)]),
        rpc_s=_mean([(peer.rpc_times, past.rpc_times)]),
        forecasts_per_s=rate(peer.forecasts_total, past.forecasts_total),
        undelivered=peer.undelivered_total,
    )


def _mean(pairs: Sequence[tuple[Spread | None, Spread | None]]) -> float | None:
    """Of what came between, if anything did; else of all. A peer that was restarted counts from nothing again."""
    whole = [(sum(now.counts), now.sum) for now, _ in pairs if now is not None]
    lately = [
        (sum(now.counts) - sum(before.counts), now.sum - before.sum)
        for now, before in pairs
        if now is not None and before is not None and sum(now.counts) >= sum(before.counts)
    ]
    for figures in (lately, whole):
        if count := sum(count for count, _ in figures):
            return sum(total for _, total in figures) / count
    return None


def _recall(now: EngineHealth, before: EngineHealth | None = None) -> float | None:
    """Forecasts that come late are counted late too, so a window's share may pass 1 by a little."""
    end, begin = now.totals, None if before is None else before.totals
    activations = end.activations - (begin.activations if begin else 0)
    named = end.predicted + end.predicted_late - (begin.predicted + begin.predicted_late if begin else 0)
    return min(1.0, named / activations) if activations > 0 else None
