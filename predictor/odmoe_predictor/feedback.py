"""The full model's own progress through a token corrects what the shadow forecast of the layers still to come.

Quantisation puts the shadow's hidden state beside the full model's, and the residual stream carries the difference on:
it is nearly the same some layers later. So what a later gate of the shadow saw, moved by the difference at a layer both
have passed, is closer to what the full model's gate is going to see. Knows gates and rows, no sequences and no wire.

K experts a token, H hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

# One layer's gate: index_1K for x_1H.
Gate = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Correction:
    """The experts a layer is forecast to need now, and those named before; both ascending."""

    experts: list[int]
    instead: list[int]


@dataclass
class _Sight:
    x_1H: Tensor
    experts: list[int]


class Sights:
    """What the shadow's gates saw of one sequence, by position and layer, and the experts last forecast from it."""

    def __init__(self) -> None:
        self._sights: dict[int, dict[int, _Sight]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._sights.values()))

    def note(self, position: int, layer: int, *, x_1H: Tensor, experts: list[int]) -> None:
        """The shadow's gate of a layer has spoken for a position; the row is copied."""
        self._sights.setdefault(position, {})[layer] = _Sight(x_1H.clone(), experts)

    def keep(self, first: int, end: int) -> None:
        """Only positions from `first` on and before `end` are still of use."""
        self._sights = {at: layers for at, layers in self._sights.items() if first <= at < end}

    def correct(
        self, position: int, *, layer: int, x_1H: Tensor, target: int, gates: Sequence[Gate]
    ) -> Correction | None:
        """The full model's gate of `layer` saw `x_1H` at a position: what that makes of the forecast of layer `target`.
        It counts as told. None when the shadow has not been at one of the two layers, or is no longer there."""
        here = self._sights.get(position, {})
        then, later = here.get(layer), here.get(target)
        if then is None or later is None:
            return None
        moved_1H = later.x_1H.float() + (x_1H.to(later.x_1H.device).float() - then.x_1H.float())
        index_1K = gates[target](moved_1H.to(later.x_1H.dtype))
        instead, later.experts = later.experts, sorted(set(index_1K.flatten().tolist()))
        return Correction(experts=later.experts, instead=instead)
