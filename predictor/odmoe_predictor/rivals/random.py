"""Forecasts drawn by lot: what any predictor has to beat. Knows only the model's shape."""

from random import Random
from typing import Final

from torch import Tensor

from odmoe_predictor.rivals.base import Forecasts, Shape
from odmoe_wire.messages import Wants


class RandomRival:
    """top-k distinct experts of every layer for each token; the same `seed` gives the same forecasts."""

    wants: Final[Wants] = "routings"
    held_bytes: Final = 0

    def __init__(self, shape: Shape, *, seed: int = 0) -> None:
        self._shape = shape
        self._lot = Random(seed)

    def begin(self, sequence: int) -> None:
        """Nothing to remember."""

    def end(self, sequence: int) -> None:
        """Nothing to forget."""

    def on_token(self, sequence: int) -> Forecasts:
        """All layers."""
        shape = self._shape
        experts = range(shape.num_experts)
        return {layer: sorted(self._lot.sample(experts, shape.top_k)) for layer in range(shape.num_layers)}

    def on_routed(self, sequence: int, layer: int, experts: list[int], x_TH: Tensor | None) -> Forecasts:
        """Nothing is learned."""
        return {}
