"""The int8 weight: symmetric, one scale for each output row, and torch's kernel for it. Knows no models.

Shape suffixes: M rows of activations, N outputs, K inputs.
"""

import platform
from functools import cache
from typing import Final

import torch
from torch import Tensor, nn

from odmoe_model.quantized_weight import Treatment, check_finite

# torch's int8 kernel reads whole vectors of inputs: with other widths, or activations that start elsewhere, it gives
# rubbish or crashes the process (seen with torch 2.13 on AVX-512 and AVX2; tests/unit/test_quantize.py).
KERNEL_INPUTS: Final = 16
KERNEL_ALIGNMENT_BYTES: Final = 32
# Its time grows with the rows, that of one dequantisation does not; they met here for the widths measured.
KERNEL_MAX_ROWS: Final = 16
_INT8_MAX: Final = 127.0


class Int8Weight:
    """Eight bits a weight and a bfloat16 scale an output row."""

    treatment: Treatment = "int8"

    def __init__(self, weight_NK: Tensor) -> None:
        """Quantise on the weight's own device. Raises ValueError for a weight that is not finite."""
        peak_N = weight_NK.abs().amax(dim=1).float()
        check_finite(peak_N)
        # The scale is rounded before it is used, so that its rounding costs half a step and not a factor.
        self._scale_N = torch.where(peak_N > 0, peak_N / _INT8_MAX, 1.0).to(torch.bfloat16)
        steps_NK = weight_NK.float() / self._scale_N.float()[:, None]
        # A transposed view must not stay one: the kernel wants its rows in a row.
        self._steps_NK = steps_NK.round_().clamp_(-_INT8_MAX, _INT8_MAX).to(torch.int8).contiguous()
        self._use_kernel = _kernel_fits(self._steps_NK)

    def linear(self, x: Tensor) -> Tensor:
        """See `QuantizedWeight`. Where torch's kernel can be used the activations are rounded to bfloat16."""
        x_MK = x.reshape(-1, self._steps_NK.shape[1])
        y_MN = self._kernel(x_MK.to(torch.bfloat16)) if self._use_kernel else self._dequantized(x_MK)
        return y_MN.to(x.dtype).view(*x.shape[:-1], -1)

    def tensors(self) -> tuple[Tensor, ...]:
        """The steps, int8 [N, K], and the scales, bfloat16 [N]."""
        return self._steps_NK, self._scale_N

    def dequantized(self) -> Tensor:
        """The weight this stands for, float32 [N, K]."""
        return self._steps_NK.float() * self._scale_N.float()[:, None]

    def _kernel(self, x_MK: Tensor) -> Tensor:
        if x_MK.shape[0] > KERNEL_MAX_ROWS:
            return self._dequantized(x_MK)
        x_MK = x_MK.contiguous()
        if x_MK.data_ptr() % KERNEL_ALIGNMENT_BYTES:
            x_MK = x_MK.clone()
        return torch._weight_int8pack_mm(x_MK, self._steps_NK, self._scale_N)

    def _dequantized(self, x_MK: Tensor) -> Tensor:
        return nn.functional.linear(x_MK, self._steps_NK.to(x_MK.dtype)) * self._scale_N.to(x_MK.dtype)


def _kernel_fits(steps_NK: Tensor) -> bool:
    return steps_NK.device.type == "cpu" and steps_NK.shape[1] % KERNEL_INPUTS == 0 and _kernel_works()


@cache
def _kernel_works() -> bool:
    """Whether this machine's build of the kernel agrees with plain arithmetic; only x86 was ever tried."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    steps_NK = (torch.arange(48 * 64) % 255 - 127).to(torch.int8).view(48, 64)
    x_MK = torch.linspace(-1, 1, 2 * 64).to(torch.bfloat16).view(2, 64)
    got_MN = torch._weight_int8pack_mm(x_MK, steps_NK, torch.ones(48, dtype=torch.bfloat16)).float()
    expected_MN = x_MK.float() @ steps_NK.float().T
    return bool((got_MN - expected_MN).abs().max() <= 0.01 * expected_MN.abs().max())
