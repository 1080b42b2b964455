"""Several rows times one weight, each by itself: the bits that each would get alone, for less than each alone costs.

A matrix product rounds by its shape, so rows of several sequences must not be multiplied together. What one row after
the other costs is the weight coming from memory again for each. Here it comes once: in blocks that stay in the cache
while all rows are multiplied, each by itself. Whether that gives the same bits is up to the kernels of the machine, so
it is tried out (`blocks_agree`). Knows no families and no stores.

Measured on one core with 2 MiB of cache, float32, rows of 1024 inputs, 7168 outputs: two rows took 2.0 ms, four 2.8,
eight 4.5; one after the other 2.1, 4.2 and 8.5 ms.

Shape suffixes: R rows, K inputs, M outputs, B outputs of a block.
"""

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

# Of a weight that is multiplied at once: half the cache of a core that is not small.
BLOCK_BYTES = 1 << 20
# Outputs a block has a multiple of, lest the last few of each be rounded in another way than in the whole.
BLOCK_STEP = 32
# Rows that are multiplied in one call, at most; so many are tried out.
MOST_ROWS = 8


def linear_by_blocks(x_RK: Tensor, weight_MK: Tensor) -> Tensor:
    """Each row times the weight, [R, M]."""
    blocks = [
        torch.cat([_each_row(part_RK, block_BK) for part_RK in torch.split(x_RK, MOST_ROWS)])
        for block_BK in _blocks(weight_MK)
    ]
    return torch.cat(blocks, dim=1)


def blocks_agree(weight_MK: Tensor) -> bool:
    """Whether on this machine `linear_by_blocks` gives the bits of each row alone, for weights of this one's shape
    and type (its contents do not matter) and as many threads as there are now."""
    if weight_MK.dtype is not torch.float32 or weight_MK.device.type not in ("cpu", "meta"):
        return False  # tried for bfloat16: the product of one row is quicker
    return _agree(*weight_MK.shape, num_threads=torch.get_num_threads())


@cache
def _agree(num_outputs: int, num_inputs: int, *, num_threads: int) -> bool:
    dice = torch.Generator().manual_seed(num_threads)
    weight_MK = torch.rand(num_outputs, num_inputs, generator=dice) - 0.5
    x_RK = torch.rand(MOST_ROWS, num_inputs, generator=dice) - 0.5
    expected_RM = torch.cat([torch.nn.functional.linear(x_K, weight_MK) for x_K in torch.split(x_RK, 1)])
    return all(
        torch.equal(linear_by_blocks(x_RK[:rows], weight_MK), expected_RM[:rows]) for rows in range(2, MOST_ROWS + 1)
    )


def _blocks(weight_MK: Tensor) -> Iterator[Tensor]:
    row_bytes = weight_MK.shape[1] * weight_MK.element_size()
    num_outputs = max(1, BLOCK_BYTES // row_bytes // BLOCK_STEP) * BLOCK_STEP
    return iter(torch.split(weight_MK, num_outputs))


def _each_row(x_RK: Tensor, block_BK: Tensor) -> Tensor:
    """One product for each row, in one call."""
    num_rows, num_inputs = x_RK.shape
    block_RKB = block_BK.T.expand(num_rows, num_inputs, block_BK.shape[0])
    return torch.bmm(x_RK.unsqueeze(1), block_RKB).squeeze(1)
