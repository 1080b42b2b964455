"""The nf4 weight of QLoRA (Dettmers et al., 2023): codes spaced as a normal distribution is. Knows no models.

No kernel of a library: torch has none, and bitsandbytes' took 1.0 ms for what takes 1.3 ms here (one row times
3072 x 576, one core with AVX-512), which is not worth a dependency of 43 MB.

Shape suffixes: N outputs, K inputs, B blocks of a row, J inputs of a block.
"""

from typing import Final

import torch
from torch import Tensor

from odmoe_model.blocks4 import CodedWeight, in_blocks
from odmoe_model.quantized_weight import Treatment, check_finite

BLOCK_SIZE: Final = 64
# Equally likely quantiles of N(0, 1), scaled to -1 to 1, with an exact zero: the paper's appendix E.
VALUES: Final = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


class Nf4Weight:
    """Four bits a weight and a bfloat16 scale a block of 64."""

    treatment: Treatment = "nf4"

    def __init__(self, weight_NK: Tensor) -> None:
        """Quantise on the weight's own device. Raises ValueError for a weight that is not finite."""
        weight_NBJ = in_blocks(weight_NK, BLOCK_SIZE)
        peak_NB = weight_NBJ.abs().amax(dim=2)
        check_finite(peak_NB)
        # Rounded before it is used, so that its rounding costs part of a step and not a factor.
        scale_NB = torch.where(peak_NB > 0, peak_NB, 1.0).to(torch.bfloat16)
        values = torch.tensor(VALUES, device=weight_NK.device)
        halfway = (values[1:] + values[:-1]) / 2
        code_NBJ = torch.bucketize(weight_NBJ / scale_NB.float()[..., None], halfway, out_int32=True)
        self._coded = CodedWeight(code_NBJ, values=VALUES, num_inputs=weight_NK.shape[1], per_block=[scale_NB])

    def linear(self, x: Tensor) -> Tensor:
        """See `QuantizedWeight`. The weight is made bfloat16 for each call, and the activations with it."""
        return self._coded.linear(x)

    def tensors(self) -> tuple[Tensor, ...]:
        """The packed codes, uint8, and the scales, bfloat16 [N, B]."""
        return self._coded.tensors()

    def dequantized(self) -> Tensor:
        """The weight this stands for, bfloat16 [N, K]."""
        return self._coded.dequantized()
