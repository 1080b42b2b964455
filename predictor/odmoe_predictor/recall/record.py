"""What the full model answers to many prompts, greedily, and everything a forecast of it has to be compared with.

Knows no shadow and no rival. Sequences that stopped stay in the batch until an eighth of it are such; then they leave
it together. Whoever replays a record has the same sequences in its batch at the same step, so that a copy of the model
does the same sums in the same order.

Shape suffixes: as in `lockstep`; N token index in the answer.
"""

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field

import torch
from torch import Tensor

from odmoe_predictor.recall.lockstep import Batch, LockstepModel
from odmoe_predictor.recall.slabs import SlabCache

# A batch is made smaller when one in so many of its sequences has stopped.
_SHRINK_AT = 8


@dataclass(frozen=True, kw_only=True)
class Step:
    """One more token of every answer: its `tokens_b` go in, `routed_LbK` come out. `rows_b` says which prompts the
    batch's sequences belong to, `alive_b` which of them have not stopped before this token. `inputs_LbH` are what
    the gates saw, where that was asked for."""

    rows_b: Tensor
    tokens_b: Tensor
    alive_b: Tensor
    routed_LbK: Tensor
    inputs_LbH: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Record:
    """The answers. `slabs` hold the full model's keys and values of every sequence as long as it was in the batch."""

    batch: Batch
    prompts: Sequence[Sequence[int]]
    slabs: SlabCache
    steps: list[Step]

    @property
    def num_alive(self) -> list[int]:
        """How many answers have a token of each index, [N]."""
        return [int(step.alive_b.sum()) for step in self.steps]

    @property
    def num_needed(self) -> int:
        """Experts a token needs in all layers."""
        num_layers, _, num_chosen = self.steps[0].routed_LbK.shape
        return num_layers * num_chosen


@torch.inference_mode()
def record_answers(
    model: LockstepModel,
    prompts: Sequence[Sequence[int]],
    *,
    tokens: int,
    stops: Set[int],
    with_inputs: bool = False,
    on_done: Callable[[], None] = lambda: None,
) -> Record:
    """Answers of at most `tokens` tokens; the one that stops an answer is not of it. `on_done` is called after each
    prompt and each step, at most `len(prompts) + tokens` times."""
    batch = Batch.of(prompts)
    slabs, tokens_b = prefill_all(model, prompts, batch=batch, slots=batch.width + tokens, on_done=on_done)
    rows_b, stop_ids = torch.arange(len(prompts)), torch.tensor(sorted(stops), dtype=torch.int64)
    cache = SlabCache.like(slabs, batch=len(prompts), slots=batch.width + tokens)
    cache.take(slabs, rows=rows_b, to=0, first=0, end=batch.width)
    alive_b, steps = torch.ones(len(prompts), dtype=torch.bool), []
    for step in range(tokens):
        alive_b = alive_b & ~torch.isin(tokens_b, stop_ids)
        if not alive_b.any():
            break
        if int((~alive_b).sum()) * _SHRINK_AT >= len(rows_b):
            cache.keep(alive_b.nonzero().flatten())
            rows_b, tokens_b, alive_b = rows_b[alive_b], tokens_b[alive_b], alive_b[alive_b]
        stepped = model.step(tokens_b, cache=cache, batch=batch, rows_b=rows_b, step=step)
        slot = batch.width + step
        slabs.put(cache, rows=rows_b, first=slot, end=slot + 1, at=slot)
        steps.append(
            Step(
                rows_b=rows_b,
                tokens_b=tokens_b,
                alive_b=alive_b,
                routed_LbK=stepped.routed_LbK,
                inputs_LbH=stepped.inputs_LbH if with_inputs else [],
            )
        )
        tokens_b = model.greedy(stepped.hidden_bH)
        on_done()
    return Record(batch=batch, prompts=prompts, slabs=slabs, steps=steps)


@torch.inference_mode()
def prefill_all(
    model: LockstepModel,
    prompts: Sequence[Sequence[int]],
    *,
    batch: Batch,
    slots: int,
    on_done: Callable[[], None] = lambda: None,
) -> tuple[SlabCache, Tensor]:
    """The prompts' keys and values, each prompt's ending before slot `batch.width`, and their greedy next tokens."""
    slabs, following = None, []
    for row, prompt in enumerate(prompts):
        cache, token = model.prefill(prompt)
        if slabs is None:
            slabs = SlabCache.like(cache, batch=len(prompts), slots=slots)
        slabs.put(cache, rows=torch.tensor([row]), first=0, end=len(prompt), at=batch.width - len(prompt))
        following.append(token)
        on_done()
    assert slabs is not None, "there are prompts"
    return slabs, torch.tensor(following)
