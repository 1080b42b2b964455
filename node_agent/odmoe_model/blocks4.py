"""Four-bit codes in memory and back: two a byte, sixteen values, a scale (and perhaps an offset) for each block.

Knows nothing of how the codes were chosen.

Shape suffixes: N outputs, K inputs, B blocks of a row, J inputs of a block.
"""

from functools import cache
from typing import Final

import torch
from torch import Tensor, nn

# Codes of a row are read four at a time, in one step through a table of all their combinations.
CODES_A_READ: Final = 4
# Of a weight in full: few enough to stay in a core's cache, many enough to make up for the calls.
_MAX_DEQUANTIZED: Final = 2**21


class CodedWeight:
    """A weight [N, K] as 4-bit codes: value of the code, times the block's scale, plus its offset if there is one.

    Rows may end in an unfinished block. What it takes in memory are `tensors`, and one table for all weights of the
    same 16 values (512 KiB)."""

    def __init__(
        self, code_NBJ: Tensor, *, values: tuple[float, ...], num_inputs: int, per_block: list[Tensor]
    ) -> None:
        """Codes 0 to 15 of any integer dtype, the last block of a row filled up with anything; J divisible by 4.
        `per_block` are the scales and, if any, the offsets, bfloat16 [N, B]."""
        num_outputs, self._num_blocks, self._block_size = code_NBJ.shape
        code = code_NBJ.reshape(num_outputs, -1).to(torch.uint8)
        self._packed = code[:, ::2] | code[:, 1::2] << 4
        self._per_block = [each_NB.contiguous() for each_NB in per_block]
        self._num_inputs = num_inputs
        self._values = values

    def linear(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in the dtype of `x`; computed in bfloat16. Never is more than a part of a large
        weight there in full."""
        x16 = x.to(torch.bfloat16)
        num_outputs = self._packed.shape[0]
        step = max(1, _MAX_DEQUANTIZED // self._num_inputs)
        parts = [
            nn.functional.linear(x16, self.dequantized(first, first + step)) for first in range(0, num_outputs, step)
        ]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)).to(x.dtype)

    def dequantized(self, first: int = 0, end: int | None = None) -> Tensor:
        """The weight this stands for, or its rows from `first` up to `end`, bfloat16 [N, K]."""
        reads = self._packed[first:end].view(torch.uint16).to(torch.int32).view(-1)
        table = _table(self._values, self._packed.device)
        weight_NBJ = torch.index_select(table, 0, reads).view(torch.bfloat16)
        weight_NBJ = weight_NBJ.view(-1, self._num_blocks, self._block_size)
        weight_NBJ.mul_(self._per_block[0][first:end, :, None])
        for offset_NB in self._per_block[1:]:
            weight_NBJ.add_(offset_NB[first:end, :, None])
        return weight_NBJ.view(weight_NBJ.shape[0], -1)[:, : self._num_inputs]

    def tensors(self) -> tuple[Tensor, ...]:
        """The packed codes, uint8, and what there is for each block, bfloat16 [N, B]."""
        return self._packed, *self._per_block


def in_blocks(weight_NK: Tensor, size: int) -> Tensor:
    """The weight as float32 [N, B, J], J = `size`; an unfinished last block is filled up with the row's last weight,
    which moves neither its smallest nor its largest."""
    missing = -weight_NK.shape[1] % size
    filled = torch.cat([weight_NK, weight_NK[:, -1:].expand(-1, missing)], dim=1) if missing else weight_NK
    return filled.float().contiguous().view(weight_NK.shape[0], -1, size)


@cache
def _table(values: tuple[float, ...], device: torch.device) -> Tensor:
    """For each 16-bit read the bfloat16 values of its codes, together an int64; [65536]."""
    reads = torch.arange(2 ** (4 * CODES_A_READ))
    of_code = torch.tensor(values, dtype=torch.bfloat16)
    quads = torch.stack([of_code[reads >> 4 * place & 15] for place in range(CODES_A_READ)], dim=-1)
    return quads.view(torch.int64).squeeze(1).to(device)
