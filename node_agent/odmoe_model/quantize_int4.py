"""The int4 weight: even steps between the smallest and the largest of a block, and torch's kernel for it.

Knows no models.

Shape suffixes: M rows of activations, N outputs, K inputs, B blocks of a row, J inputs of a block.
"""

import platform
from functools import cache
from typing import Final

import torch
from torch import Tensor, nn

from odmoe_model.blocks4 import CodedWeight, in_blocks
from odmoe_model.quantized_weight import Treatment, check_finite

# The kernel's conditions: this many outputs at a time, and blocks of 32, 64, 128 or 256.
KERNEL_OUTPUTS: Final = 16
BLOCK_SIZE: Final = 64
SMALL_BLOCK_SIZE: Final = 32
_STEPS: Final = 15
_MIDDLE: Final = 8
# Any; torch's CPU kernel asks for it and does not use it.
_INNER_K_TILES: Final = 8


class Int4Weight:
    """Four bits a weight, and a bfloat16 scale and offset a block: of 64, or of 32 where 64 does not divide."""

    treatment: Treatment = "int4"

    def __init__(self, weight_NK: Tensor, *, use_kernel: bool | None = None) -> None:
        """Quantise on the weight's own device; `use_kernel` is found out when not given. Raises ValueError for a
        weight that is not finite."""
        num_inputs = weight_NK.shape[1]
        block_size = BLOCK_SIZE if num_inputs % BLOCK_SIZE == 0 else SMALL_BLOCK_SIZE
        code_NBJ, per_block = _quantized(in_blocks(weight_NK, block_size))
        self._coded: CodedWeight | _KernelWeight
        if weight_NK.device.type == "cpu" and _kernel_works() if use_kernel is None else use_kernel:
            self._coded = _KernelWeight(code_NBJ, per_block, num_inputs=num_inputs)
        else:
            values = tuple(float(code - _MIDDLE) for code in range(_STEPS + 1))
            self._coded = CodedWeight(code_NBJ, values=values, num_inputs=num_inputs, per_block=per_block)

    def linear(self, x: Tensor) -> Tensor:
        """See `QuantizedWeight`. The activations are rounded to bfloat16."""
        return self._coded.linear(x)

    def tensors(self) -> tuple[Tensor, ...]:
        """The packed codes, uint8, and scales and offsets, bfloat16."""
        return self._coded.tensors()


class _KernelWeight:
    """Codes in the order torch's kernel reads them, which differs from processor to processor. Outputs and inputs
    are filled up to what it can do."""

    def __init__(self, code_NBJ: Tensor, per_block: list[Tensor], *, num_inputs: int) -> None:
        self._num_outputs, num_blocks, self._block_size = code_NBJ.shape
        self._missing_inputs = num_blocks * self._block_size - num_inputs
        missing = -self._num_outputs % KERNEL_OUTPUTS
        code_NK = nn.functional.pad(code_NBJ.flatten(1), (0, 0, 0, missing)).contiguous()
        self._packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(code_NK, _INNER_K_TILES)
        scale_offset_NB2 = nn.functional.pad(torch.stack(per_block, dim=-1), (0, 0, 0, 0, 0, missing))
        self._scale_offset_BN2 = scale_offset_NB2.transpose(0, 1).contiguous()

    def linear(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in the dtype of `x`."""
        # float32 and float16 would be right too, in thirty times the time.
        x_MK = nn.functional.pad(x.to(torch.bfloat16), (0, self._missing_inputs))
        x_MK = x_MK.reshape(-1, x_MK.shape[-1]).contiguous()
        y_MN: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x_MK, self._packed, self._block_size, self._scale_offset_BN2
        )
        return y_MN[:, : self._num_outputs].to(x.dtype).reshape(*x.shape[:-1], self._num_outputs)

    def tensors(self) -> tuple[Tensor, ...]:
        """Codes, and scales with offsets."""
        return self._packed, self._scale_offset_BN2


def _quantized(weight_NBJ: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Codes 0 to 15, int32, and scales and offsets, bfloat16 [N, B]: weight = (code - 8) * scale + offset."""
    least_NB, most_NB = weight_NBJ.aminmax(dim=2)
    check_finite(most_NB - least_NB)
    step_NB = (most_NB - least_NB) / _STEPS
    # Rounded before they are used. A block of equal weights is all offset.
    scale_NB = torch.where(step_NB > 0, step_NB, 1.0).to(torch.bfloat16)
    offset_NB = (least_NB + _MIDDLE * step_NB).to(torch.bfloat16)
    steps_NBJ = (weight_NBJ - offset_NB.float()[..., None]) / scale_NB.float()[..., None]
    code_NBJ = steps_NBJ.round_().add_(_MIDDLE).clamp_(0, _STEPS).to(torch.int32)
    return code_NBJ, [scale_NB, offset_NB]


@cache
def _kernel_works() -> bool:
    """Whether this machine's build of the kernel agrees with plain arithmetic; only x86 was ever tried."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    weight_NK = (torch.arange(48 * 96) % 37 - 11).float().view(48, 96)
    x_MK = torch.linspace(-1, 1, 3 * 96).to(torch.bfloat16).view(3, 96)
    expected_MN = Int4Weight(weight_NK, use_kernel=False).linear(x_MK).float()
    got_MN = Int4Weight(weight_NK, use_kernel=True).linear(x_MK).float()
    return bool((got_MN - expected_MN).abs().max() <= 0.02 * expected_MN.abs().max())
