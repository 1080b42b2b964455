"""Forecasts by habit: the experts each layer has chosen most often so far, in all sequences together."""

from typing import Final

from torch import Tensor

from odmoe_predictor.rivals.base import Forecasts, Shape
from odmoe_wire.messages import Wants

_COUNT_BYTES: Final = 8


class FrequencyRival:
    """Learns as it goes. A layer that was never seen has no forecast; of equally frequent experts the first are
    taken."""

    wants: Final[Wants] = "routings"

    def __init__(self, shape: Shape) -> None:
        self._top_k = shape.top_k
        self._counts_LE = [[0] * shape.num_experts for _ in range(shape.num_layers)]

    @property
    def held_bytes(self) -> int:
        """Eight a count."""
        return _COUNT_BYTES * sum(map(len, self._counts_LE))

    def begin(self, sequence: int) -> None:
        """What was learned from others serves this one too."""

    def end(self, sequence: int) -> None:
        """What was learned stays."""

    def on_token(self, sequence: int) -> Forecasts:
        """All layers seen so far."""
        return {layer: self._most_frequent(counts) for layer, counts in enumerate(self._counts_LE) if any(counts)}

    def on_routed(self, sequence: int, layer: int, experts: list[int], x_TH: Tensor | None) -> Forecasts:
        """Learn."""
        for expert in experts:
            self._counts_LE[layer][expert] += 1
        return {}

    def _most_frequent(self, counts_E: list[int]) -> list[int]:
        ranked = sorted(range(len(counts_E)), key=lambda expert: -counts_E[expert])
        return sorted(ranked[: self._top_k])
