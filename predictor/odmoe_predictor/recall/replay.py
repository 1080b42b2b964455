"""Shadows that are told, step by step, what the full model did, aligned as the server would align them.

The semantics are those of `Shadow.align` without run-ahead, for all sequences at once: in a step whose token is due
the full model's goes in, else the shadow's own greedy one; when keys and values are due, the full model's replace the
shadow's at every position since the last time. Several alignments of one shadow go through it in one batch, since its
weights are then read, and made 16-bit again, once for all.

Shape suffixes: as in `lockstep`; A alignments, N token index in the answer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from odmoe_predictor.recall.alignment import Alignment, is_due
from odmoe_predictor.recall.lockstep import LockstepModel
from odmoe_predictor.recall.record import Record, prefill_all
from odmoe_predictor.recall.slabs import SlabCache
from odmoe_predictor.recall.tally import Tally, num_hits_b


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """A tally for each alignment, and the time the steps of all of them together took."""

    tallies: list[Tally]
    seconds: float


@torch.inference_mode()
def replay(
    model: LockstepModel,
    record: Record,
    alignments: Sequence[Alignment],
    *,
    on_done: Callable[[], None] = lambda: None,
    on_forecast: Callable[[int, Tensor], None] = lambda step, forecast_LAbK: None,
) -> Replayed:
    """Forecast every step of the record and count. `on_done` is called after each step, `on_forecast` before."""
    shadows = _Shadows(model, record, alignments)
    hits_AN: list[list[int]] = [[] for _ in alignments]
    agreed_A = torch.zeros(len(alignments), dtype=torch.int64)
    for index, step in enumerate(record.steps):
        shadows.keep(step.rows_b)
        if index:
            agreed_A += (shadows.own_Ab == step.tokens_b)[:, step.alive_b].sum(dim=1)
        forecast_LAbK = shadows.forecast(index, shadows.align(index))
        for place, hits_N in enumerate(hits_AN):
            hits_N.append(int(num_hits_b(forecast_LAbK[:, place], step.routed_LbK)[step.alive_b].sum()))
        on_forecast(index, forecast_LAbK)
        on_done()
    alive_N = record.num_alive
    tallies = [
        Tally(hits_N=hits_N, alive_N=alive_N, num_needed=record.num_needed, agreed=agreed, guesses=sum(alive_N[1:]))
        for hits_N, agreed in zip(hits_AN, agreed_A.tolist(), strict=True)
    ]
    return Replayed(tallies=tallies, seconds=shadows.seconds)


class _Shadows:
    """One batch of every alignment's sequences, alignment by alignment. `own_Ab` are the tokens they would go on
    with; `aligned_to` is the slot up to which an alignment has the full model's keys and values."""

    def __init__(self, model: LockstepModel, record: Record, alignments: Sequence[Alignment]) -> None:
        self._model, self._record, self._alignments = model, record, alignments
        self._rows_b = torch.arange(len(record.prompts))
        self.own_Ab = torch.zeros(len(alignments), len(record.prompts), dtype=torch.int64)
        self._aligned_to = [record.batch.width] * len(alignments)
        self._cache = self._prompts()
        self.seconds = 0.0

    def _prompts(self) -> SlabCache:
        """The keys and values each alignment's sequences begin with."""
        record, width = self._record, self._record.batch.width
        batch, slots = self.own_Ab.numel(), width + len(record.steps)
        cache = SlabCache.like(record.slabs, batch=batch, slots=slots)
        for place, alignment in enumerate(self._alignments):
            prompts = record.slabs
            if alignment.prompt_kv == "own":
                prompts, _ = prefill_all(self._model, record.prompts, batch=record.batch, slots=width)
            cache.take(prompts, rows=self._rows_b, to=place * len(self._rows_b), first=0, end=width)
        return cache

    def keep(self, rows_b: Tensor) -> None:
        """Go on with these sequences, some of those there were."""
        if len(rows_b) == len(self._rows_b):
            return
        kept_b = torch.isin(self._rows_b, rows_b)
        self._cache.keep(kept_b.repeat(len(self._alignments)).nonzero().flatten())
        self._rows_b, self.own_Ab = rows_b, self.own_Ab[:, kept_b]

    def align(self, index: int) -> Tensor:
        """Take over the keys and values that are due in this step; the tokens to go on with, [A, b]."""
        slot = self._record.batch.width + index
        for place, alignment in enumerate(self._alignments):
            if is_due(index, alignment.kv):
                to, first = place * len(self._rows_b), self._aligned_to[place]
                self._cache.take(self._record.slabs, rows=self._rows_b, to=to, first=first, end=slot)
                self._aligned_to[place] = slot
        due_A = torch.tensor([is_due(index, alignment.token) for alignment in self._alignments])
        return torch.where(due_A[:, None], self._record.steps[index].tokens_b, self.own_Ab)

    def forecast(self, index: int, tokens_Ab: Tensor) -> Tensor:
        """The experts the tokens go to, [L, A, b, K]."""
        began_s = perf_counter()
        stepped = self._model.step(
            tokens_Ab.flatten(),
            cache=self._cache,
            batch=self._record.batch,
            rows_b=self._rows_b.repeat(len(self._alignments)),
            step=index,
        )
        self.seconds += perf_counter() - began_s
        self.own_Ab = self._model.greedy(stepped.hidden_bH).view(tokens_Ab.shape)
        return stepped.routed_LbK.view(-1, *tokens_Ab.shape, stepped.routed_LbK.shape[-1])
