"""The 16-bit weight: float16 or bfloat16, whichever costs less. Knows no models.

Shape suffixes: N outputs, K inputs.
"""

from functools import cache

import torch
from torch import Tensor, nn

from odmoe_model.quantized_weight import Treatment, check_finite


class HalfWeight:
    """Sixteen bits a weight. One that has sixteen already stays as it is, to the bit; a wider one becomes what the
    device prefers, and bfloat16 where float16 does not reach far enough."""

    def __init__(self, weight_NK: Tensor) -> None:
        """Copies, on the weight's own device. Raises ValueError for a weight that is not finite."""
        peak = weight_NK.abs().max()
        check_finite(peak)
        dtype = weight_NK.dtype if weight_NK.itemsize == 2 else preferred_dtype(weight_NK.device)
        if dtype == torch.float16 and peak > torch.finfo(dtype).max:
            dtype = torch.bfloat16
        self._weight_NK = weight_NK.to(dtype, copy=True, memory_format=torch.contiguous_format)
        self.treatment: Treatment = "bf16" if dtype == torch.bfloat16 else "fp16"

    def linear(self, x: Tensor) -> Tensor:
        """See `QuantizedWeight`. The activations are rounded to the weight's dtype."""
        return nn.functional.linear(x.to(self._weight_NK.dtype), self._weight_NK).to(x.dtype)

    def tensors(self) -> tuple[Tensor, ...]:
        """The weight [N, K]."""
        return (self._weight_NK,)


@cache
def preferred_dtype(device: torch.device) -> torch.dtype:
    """The 16-bit dtype the device multiplies best: bfloat16 where it has instructions for it, else float16."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = any(there is True for name, there in torch.cpu.get_capabilities().items() if "bf16" in name)
    return torch.bfloat16 if native else torch.float16
