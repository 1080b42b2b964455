"""Forecasts by inertia: each layer's experts of the sequence's previous token."""

from typing import Final

from torch import Tensor

from odmoe_predictor.rivals.base import Forecasts
from odmoe_wire.messages import Wants

_ENTRY_BYTES: Final = 8


class PreviousRival:
    """The first token of a sequence has no forecast."""

    wants: Final[Wants] = "routings"

    def __init__(self) -> None:
        self._chosen: dict[int, Forecasts] = {}

    @property
    def held_bytes(self) -> int:
        """Eight an expert remembered."""
        return _ENTRY_BYTES * sum(len(experts) for layers in self._chosen.values() for experts in layers.values())

    def begin(self, sequence: int) -> None:
        """Nothing has been chosen yet."""
        self._chosen[sequence] = {}

    def end(self, sequence: int) -> None:
        """Forget the sequence."""
        self._chosen.pop(sequence, None)

    def on_token(self, sequence: int) -> Forecasts:
        """All layers of which the previous token's choice is known."""
        return dict(self._chosen[sequence])

    def on_routed(self, sequence: int, layer: int, experts: list[int], x_TH: Tensor | None) -> Forecasts:
        """Remember for the next token."""
        self._chosen[sequence][layer] = sorted(experts)
        return {}
