"""What a quantised weight is to those who use one. Knows no precision and no model.

Shape suffixes: N outputs, K inputs.
"""

from collections.abc import Callable
from typing import Literal, Protocol

from torch import Tensor

# Treatment of a weight: named after the precision, or left as it is, or not needed and given back.
Treatment = Literal["fp16", "bf16", "int8", "nf4", "int4", "kept"]


class QuantizedWeight(Protocol):
    """The weight of a linear layer in fewer bytes."""

    treatment: Treatment

    def linear(self, x: Tensor) -> Tensor:
        """x [..., K] times the weight's transpose: [..., N] in the dtype of `x`, without bias."""
        ...

    def tensors(self) -> tuple[Tensor, ...]:
        """Everything it holds."""
        ...


# Makes a quantised weight of a floating-point one, [N, K], which it does not keep.
Quantizer = Callable[[Tensor], QuantizedWeight]


def check_finite(peaks: Tensor) -> None:
    """Raises ValueError unless all are numbers; the peaks of a weight are, only if all of it is."""
    if not bool(peaks.isfinite().all()):
        raise ValueError("a weight is not finite; the checkpoint is damaged")
