"""Forecasts by the model's own gates: that of a later layer applied to what an earlier layer's gate saw.

Mixtral-Offloading, AdapMoE and HOBBIT do so. Since each layer adds little to the residual stream, its input resembles
the next one's. Knows the gates (`odmoe_model.routers`) and nothing else of the model.

T token rows of the step, H hidden size, K experts a token.
"""

from typing import Final

import torch
from torch import Tensor

from odmoe_model.routers import Router, load_routers
from odmoe_model.store import ExpertStore
from odmoe_predictor.rivals.base import Forecasts
from odmoe_wire.messages import Wants


class GateRival:
    """Layer l is forecast when layer l - `look_ahead` is routed; the first `look_ahead` layers have no forecast."""

    wants: Final[Wants] = "inputs"

    def __init__(self, routers: list[Router], *, look_ahead: int = 1) -> None:
        if not 1 <= look_ahead < len(routers):
            raise ValueError(f"a look-ahead of {look_ahead} layers forecasts nothing in a model of {len(routers)}")
        self._routers = routers
        self._look_ahead = look_ahead

    @classmethod
    def load(cls, store: ExpertStore, *, look_ahead: int = 1) -> "GateRival":
        """The gates of the store's model. Raises ValueError for a look-ahead beyond the model, RoutersError for a
        family whose gates are not known."""
        return cls(load_routers(store), look_ahead=look_ahead)

    @property
    def held_bytes(self) -> int:
        """The gates' weights."""
        return sum(router.held_bytes for router in self._routers)

    def begin(self, sequence: int) -> None:
        """Nothing to remember."""

    def end(self, sequence: int) -> None:
        """Nothing to forget."""

    def on_token(self, sequence: int) -> Forecasts:
        """Nothing is known of a token before its first layer."""
        return {}

    @torch.inference_mode()
    def on_routed(self, sequence: int, layer: int, experts: list[int], x_TH: Tensor | None) -> Forecasts:
        """The layer that many further on. Raises ValueError without inputs."""
        if x_TH is None:
            raise ValueError("the gates need a layer's inputs")
        ahead = layer + self._look_ahead
        if ahead >= len(self._routers):
            return {}
        index_TK = self._routers[ahead](x_TH)
        return {ahead: sorted(set(index_TK.flatten().tolist()))}
