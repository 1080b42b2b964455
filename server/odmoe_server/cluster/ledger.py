"""What the cluster did, in numbers for people who watch it. Pure; decides nothing, knows neither time nor tensors."""

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from odmoe_server.engine_api import LayerOutcomes, Spread
from odmoe_wire.messages import ExpertTiming, Span

RPC_BOUNDS_S: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
MAX_NODES: Final = 256


@dataclass(kw_only=True)
class _Times:
    counts: list[int] = field(default_factory=lambda: [0] * (len(RPC_BOUNDS_S) + 1))
    sum_s: float = 0.0


@dataclass(kw_only=True)
class Ledger:
    """Counts only grow. `last` is the newest decode call: one of its spans and its layer."""

    num_layers: int
    realigns_total: int = 0
    last: tuple[Span, int] | None = None
    _outcomes: list[dict[str, int]] = field(init=False)
    _substituted: list[int] = field(init=False)
    _rpc: dict[str, _Times] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._outcomes = [{"hit": 0, "late": 0, "miss": 0} for _ in range(self.num_layers)]
        self._substituted = [0] * self.num_layers

    def answered(self, peer_id: str, took_s: float) -> None:
        """A node's answer came so long after the compute was sent."""
        if peer_id not in self._rpc and len(self._rpc) >= MAX_NODES:  # ids are the peers' own
            del self._rpc[next(iter(self._rpc))]
        times = self._rpc.setdefault(peer_id, _Times())
        times.counts[bisect_left(RPC_BOUNDS_S, took_s)] += 1
        times.sum_s += took_s

    def served(self, layer: int, timings: Iterable[ExpertTiming]) -> None:
        """A decode step's call is complete."""
        for timing in timings:
            self._outcomes[layer][timing.outcome] += 1

    def replaced(self, layer: int, count: int) -> None:
        """Others stood in for so many of a decode step's experts. From the thread that decodes, and no other."""
        self._substituted[layer] += count

    def outcomes(self) -> tuple[LayerOutcomes, ...]:
        """By layer, in order."""
        return tuple(
            LayerOutcomes(
                layer=layer,
                hit=counts["hit"],
                late=counts["late"],
                missed=counts["miss"],
                substituted=self._substituted[layer],
            )
            for layer, counts in enumerate(self._outcomes)
        )

    def rpc(self, peer_id: str) -> Spread | None:
        """How long a node's answers took; None before the first."""
        times = self._rpc.get(peer_id)
        return None if times is None else Spread(bounds=RPC_BOUNDS_S, counts=tuple(times.counts), sum=times.sum_s)

    def lead_layers(self, forecasts: Mapping[tuple[int, int], Mapping[int, frozenset[int]]]) -> int | None:
        """How many layers the newest forecast is ahead of the full model; None when nothing is decoded or forecast.
        `forecasts`: (sequence, position) -> layer -> experts."""
        if self.last is None:
            return None
        span, layer = self.last
        ahead = [
            (position - span.position) * self.num_layers + max(layers) - layer
            for (sequence, position), layers in forecasts.items()
            if sequence == span.sequence and layers
        ]
        return max(ahead, default=None)
