"""What every rival of the shadow is: a maker of forecasts that is told what the full model did. Knows no sockets.

The driver of a rival calls `begin`, then for each decode token `on_token` once and `on_routed` for each MoE layer in
ascending order, then `end`. Prompts are not told. Whoever forecasts a layer more than once for one token has the last
word: the newer forecast replaces the older.

T token rows of the step, H hidden size.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from odmoe_model.manifest import Manifest
from odmoe_wire.messages import Wants

# Layer -> the experts forecast for it, ascending.
Forecasts = dict[int, list[int]]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What of a model a rival has to know."""

    num_layers: int
    num_experts: int
    top_k: int

    @classmethod
    def of(cls, manifest: Manifest) -> "Shape":
        """The shape of a store."""
        return cls(num_layers=manifest.num_moe_layers, num_experts=manifest.num_experts, top_k=manifest.top_k)


class Rival(Protocol):
    """Forecasts made from what the full model did. One object for all sequences; one thread uses it.

    `on_token` and `on_routed` may raise KeyError for a sequence that was not begun."""

    @property
    def wants(self) -> Wants:
        """What it has to be told of each layer: "routings", or "inputs" as well."""

    def begin(self, sequence: int) -> None:
        """A sequence begins, or begins anew."""

    def end(self, sequence: int) -> None:
        """The sequence is over; one that is not known is over already."""

    def on_token(self, sequence: int) -> Forecasts:
        """Before each decode token: what can be forecast of its layers now."""

    def on_routed(self, sequence: int, layer: int, experts: list[int], x_TH: Tensor | None) -> Forecasts:
        """The gate of a layer has chosen `experts`; `x_TH` are the rows it saw, for those that want inputs. Returns
        the forecasts for later layers that this allows."""

    @property
    def held_bytes(self) -> int:
        """Bytes of what it keeps: weights, counts, the state of its sequences."""
