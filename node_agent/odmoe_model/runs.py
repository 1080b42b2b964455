"""Several rows times one weight, each by itself: the bits that each would get alone, for less than each alone costs.

A matrix product may round by its shape, so rows of several sequences must not simply be multiplied together. What one
row after the other costs is the weight coming from memory again for each. There are two ways to let it come once. Where
a product of many rows gives each row the bits it has alone, as with bfloat16 on matrix units, it is that product
(`rows_agree`). Else it is done in blocks that stay in the cache while all rows are multiplied, each by itself
(`blocks_agree`). Which of these holds is up to the kernels of the machine, so it is tried out. Knows no families and no
stores.

Measured on one core with 2 MiB of cache, float32, rows of 1024 inputs, 7168 outputs: two rows took 2.0 ms, four 2.8,
eight 4.5; one after the other 2.1, 4.2 and 8.5 ms. On a core with AMX, bfloat16, 576 inputs, 3072 outputs: one row took
0.25 ms, sixteen in one product 0.27.

Shape suffixes: R rows, K inputs, M outputs, B outputs of a block.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import groupby

import torch
from torch import Tensor

# Of a weight that is multiplied at once: half the cache of a core that is not small.
BLOCK_BYTES = 1 << 20
# Outputs a block has a multiple of, lest the last few of each be rounded in another way than in the whole.
BLOCK_STEP = 32
# Rows that are multiplied in one call, at most; so many are tried out.
MOST_ROWS = 8
# Rows of one product, at most, where that gives the same bits; every number up to it is tried out.
MOST_TOGETHER = 16
# The same of prompts, of which an expert has some rows each; the kernels of AMX agree up to 32 or 36.
MOST_OF_PROMPTS = 32
# Powers of two by which the numbers of a trial differ, so that sums in another order cannot look the same.
_SPREAD = 12


def linear_together(x: Tensor, weight_MK: Tensor, bias_M: Tensor | None = None, *, most: int = MOST_TOGETHER) -> Tensor:
    """Rows [R, ..., K] times the weight in products of at most so many. For weights that `rows_agree`."""
    if x.shape[0] <= most:
        return torch.nn.functional.linear(x, weight_MK, bias_M)
    return torch.cat([torch.nn.functional.linear(part, weight_MK, bias_M) for part in torch.split(x, most)])


def rows_agree(weight_MK: Tensor, bias_M: Tensor | None = None, *, most: int = MOST_TOGETHER) -> bool:
    """Whether on this machine a product of up to `most` rows gives each of them the bits it has alone, for weights of
    this one's shape and type (its contents do not matter) and as many threads as there are now."""
    if weight_MK.dtype is not torch.bfloat16 or weight_MK.device.type not in ("cpu", "meta"):
        return False  # tried for float32: no kernel has it, and blocks serve
    threads = torch.get_num_threads()
    return _agree_together(*weight_MK.shape, most=most, has_bias=bias_M is not None, num_threads=threads)


def most_together(weight_MK: Tensor) -> int:
    """Up to how many rows, whosever they are, `rows_agree`; 1 if none do."""
    return next((most for most in (MOST_OF_PROMPTS, MOST_TOGETHER) if rows_agree(weight_MK, most=most)), 1)


def linear_of_runs(
    x: Tensor, weight_MK: Tensor, runs: Sequence[int], *, most: int, alone: Callable[[Tensor], Tensor]
) -> Tensor:
    """Each run of the rows [N, K] times the weight: those of up to `most` rows, for which products of so many are known
    to agree, in as few products as that allows, and `alone` those that are longer."""
    products: list[Tensor] = []
    start = 0
    for is_short, group in groupby(runs, lambda length: length <= most):
        lengths = list(group)
        part = x[start : start + sum(lengths)]
        start += sum(lengths)
        if is_short:
            products.append(linear_together(part, weight_MK, most=most))
        else:
            products += map(alone, torch.split(part, lengths))
    return products[0] if len(products) == 1 else torch.cat(products)


@cache
def _agree_together(num_outputs: int, num_inputs: int, *, most: int, has_bias: bool, num_threads: int) -> bool:
    dice = torch.Generator().manual_seed(num_threads)
    # Of very unlike size, large ones cancelling: there the order of additions shows.
    spread_K = torch.randint(-_SPREAD, _SPREAD + 1, (num_inputs,), generator=dice).float().exp2()
    weight_MK = torch.randn(num_outputs, num_inputs, dtype=torch.bfloat16, generator=dice).mul_(spread_K)
    bias_M = torch.randn(num_outputs, dtype=torch.bfloat16, generator=dice) if has_bias else None
    x_RK = torch.randn(most, num_inputs, generator=dice).mul_(spread_K.roll(1)).bfloat16()
    linear = torch.nn.functional.linear
    alone_RM = torch.cat([linear(x_1K, weight_MK, bias_M) for x_1K in torch.split(x_RK, 1)])
    if not torch.equal(
        alone_RM, torch.cat([linear(x_1K[None], weight_MK, bias_M)[0] for x_1K in torch.split(x_RK, 1)])
    ):
        return False
    return all(
        torch.equal(linear_together(x_RK[:rows], weight_MK, bias_M, most=most), alone_RM[:rows])
        and torch.equal(linear_together(x_RK[:rows, None], weight_MK, bias_M, most=most)[:, 0], alone_RM[:rows])
        for rows in range(2, most + 1)
    )


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
