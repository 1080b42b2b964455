"""From counts and losses to the rows of the record. Pure.

Times here are computed from what single things take (`device`); what a server took is told by `served`.
"""

import math
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from odmoe_server.bench.importance.arms import LRU
from odmoe_server.bench.importance.device import Counts
from odmoe_server.bench.importance.fleet import Arm

REPLAYED: Final = "replayed"
SERVED: Final = "served"
_NORMAL_95: Final = 1.96


class Row(msgspec.Struct, kw_only=True):
    """A line of the record. Shares, rates and ratios are fractions. `how` it came about: `replayed` in one process
    with the policies' own rules, times computed (`tpot_computed_ms`); or `served` and timed (`tpot_ms`, `ttft_ms`).
    `tpot_vs_lru` and its computed counterpart: how much longer than LRU with the same slots and batch, less one.
    `perplexity_low` and `_high`: 95 % interval of `perplexity_vs_gated`, the ratio to no substitution, less one."""

    model: str
    how: str
    policy: str
    slots_share: float
    slots: int
    batch: int
    alpha: float
    window: int | None = None
    hit_rate: float
    host_share: float | None = None
    substituted: float | None = None
    bytes_per_token: float
    tpot_ms: float | None = None
    tpot_vs_lru: float | None = None
    ttft_ms: float | None = None
    tpot_computed_ms: float | None = None
    tpot_computed_vs_lru: float | None = None
    perplexity: float | None = None
    perplexity_vs_gated: float | None = None
    perplexity_low: float | None = None
    perplexity_high: float | None = None
    agreement: float | None = None
    tasks_right: int | None = None
    tasks: int | None = None


def replayed_row(model: str, arm: Arm, counts: Counts, *, record_bytes: int, num_experts: int) -> Row:
    """What the counts of an arm say; `num_experts` are all the model's."""
    tokens = counts.steps * arm.batch
    return Row(
        model=model,
        how=REPLAYED,
        policy=arm.policy,
        slots_share=arm.slots_share,
        slots=round(arm.slots_share * num_experts),
        batch=arm.batch,
        alpha=arm.alpha,
        window=None if arm.features.eviction in ("lru", "lfu") else arm.features.window,
        hit_rate=counts.hits / counts.needed,
        host_share=counts.on_host / counts.needed,
        substituted=counts.replaced / counts.chosen,
        bytes_per_token=counts.loads * record_bytes / tokens,
        tpot_computed_ms=1e3 * counts.seconds / counts.steps,
    )


def add_quality(row: Row, losses: Sequence[float], reference: Sequence[float], *, agreed: int) -> None:
    """Perplexity of the losses, and against the reference's on the same tokens."""
    row.perplexity = math.exp(_mean(losses))
    row.agreement = agreed / len(losses)
    gaps = [loss - other for loss, other in zip(losses, reference, strict=True)]
    gap = _mean(gaps)
    error = math.sqrt(sum((one - gap) ** 2 for one in gaps) / max(1, len(gaps) - 1) / len(gaps))
    row.perplexity_vs_gated = math.expm1(gap)
    row.perplexity_low = math.expm1(gap - _NORMAL_95 * error)
    row.perplexity_high = math.expm1(gap + _NORMAL_95 * error)


def compare(rows: Sequence[Row]) -> None:
    """Set the times of all rows against those of LRU with the same slots and batch, measured in the same way."""
    base = {_same(row): row for row in rows if row.policy == LRU}
    for row in rows:
        lru = base.get(_same(row))
        if lru is None:
            continue
        if row.tpot_ms is not None and lru.tpot_ms is not None:
            row.tpot_vs_lru = row.tpot_ms / lru.tpot_ms - 1
        if row.tpot_computed_ms is not None and lru.tpot_computed_ms is not None:
            row.tpot_computed_vs_lru = row.tpot_computed_ms / lru.tpot_computed_ms - 1


def _same(row: Row) -> tuple[Any, ...]:
    return row.model, row.how, row.slots_share, row.batch


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
