"""Logits to the next token. Knows transformers' logits processors; knows no model and no text.

B sequences (always one), V vocabulary, T tokens.
"""

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from odmoe_server.engine_api import Sampling, Token

# Dividing by less overflows, and all but the likeliest token would be gone anyway.
_LEAST_TEMPERATURE: Final = 1e-5


class OccurrencePenalty(LogitsProcessor):  # type: ignore[misc]  # transformers is not typed
    """OpenAI's presence and frequency penalties, which transformers has not: of the answer's tokens only."""

    def __init__(self, *, presence: float, frequency: float, num_prompt: int) -> None:
        self._presence, self._frequency, self._num_prompt = presence, frequency, num_prompt

    def __call__(self, ids_BT: Tensor, scores_BV: Tensor) -> Tensor:
        """scores_BV less what their tokens have earned."""
        counts_V = torch.bincount(ids_BT[0, self._num_prompt :], minlength=scores_BV.shape[-1])
        return scores_BV - self._frequency * counts_V - self._presence * (counts_V > 0)


class Constrained(LogitsProcessor):  # type: ignore[misc]  # transformers is not typed
    """A `Constraint` that has been started, as a processor."""

    def __init__(self, allow: Callable[[Sequence[int], Tensor], Tensor], *, num_prompt: int) -> None:
        self._allow, self._num_prompt = allow, num_prompt

    def __call__(self, ids_BT: Tensor, scores_BV: Tensor) -> Tensor:
        """scores_BV, -inf where the constraint forbids."""
        return self._allow(ids_BT[0, self._num_prompt :].tolist(), scores_BV[0]).unsqueeze(0)


def processors(sampling: Sampling, *, num_prompt: int, end_ids: frozenset[int]) -> LogitsProcessorList:
    """What the logits go through, in order, behind a prompt of so many tokens. Greedy choice leaves out what only
    changes how likely the others are."""
    found = LogitsProcessorList()
    if sampling.logit_bias:
        found.append(SequenceBiasLogitsProcessor({(token,): float(bias) for token, bias in sampling.logit_bias}))
    if sampling.repetition_penalty != 1.0:
        found.append(RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
    if sampling.presence_penalty or sampling.frequency_penalty:
        found.append(
            OccurrencePenalty(
                presence=sampling.presence_penalty, frequency=sampling.frequency_penalty, num_prompt=num_prompt
            )
        )
    if sampling.min_tokens and end_ids:
        found.append(MinNewTokensLengthLogitsProcessor(num_prompt, sampling.min_tokens, sorted(end_ids)))
    if sampling.constraint is not None:
        found.append(Constrained(sampling.constraint.start(), num_prompt=num_prompt))
    return found if is_greedy(sampling) else LogitsProcessorList([*found, *_warpers(sampling)])


def is_greedy(sampling: Sampling) -> bool:
    """Whether the likeliest token is taken."""
    return sampling.temperature < _LEAST_TEMPERATURE


def _warpers(sampling: Sampling) -> list[LogitsProcessor]:
    """In the order of transformers' `generate`."""
    found: list[LogitsProcessor] = []
    if sampling.temperature != 1.0:
        found.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k > 0:
        found.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        found.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0.0:
        found.append(MinPLogitsWarper(sampling.min_p))
    return found


class Sampler:
    """Chooses the tokens of one sequence. With a seed, or greedy, the same logits give the same tokens whatever
    else the server does: each sequence draws from a generator of its own. `end_ids` end the sequence."""

    def __init__(self, sampling: Sampling, *, end_ids: frozenset[int] = frozenset()) -> None:
        self._sampling = sampling
        self._end_ids = end_ids
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)
        self._processors: LogitsProcessorList | None = None

    def next_token(self, logits_V: Tensor, ids: Sequence[int]) -> Token:
        """The next token behind `ids`, the prompt's and the answer's so far: the first call has the prompt alone, and
        each later one a token more. Works in float32 on the CPU, as transformers' `generate` does."""
        if self._processors is None:
            self._processors = processors(self._sampling, num_prompt=len(ids), end_ids=self._end_ids)
        raw_V = logits_V.to("cpu", torch.float32)
        scores_V = raw_V
        if self._processors:
            scores_V = self._processors(torch.tensor([ids], dtype=torch.long), raw_V.unsqueeze(0))[0]
        chosen = self._choose(scores_V)
        wanted = self._sampling.top_logprobs
        return Token(chosen) if wanted is None else _scored(chosen, raw_V, wanted=wanted)

    def _choose(self, scores_V: Tensor) -> int:
        if is_greedy(self._sampling):
            return int(scores_V.argmax())
        return int(torch.multinomial(scores_V.softmax(dim=-1), 1, generator=self._generator))


def _scored(token_id: int, raw_V: Tensor, *, wanted: int) -> Token:
    logprobs_V = raw_V.log_softmax(dim=-1)
    best = logprobs_V.topk(min(wanted, len(logprobs_V)))
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Token(token_id, logprob=float(logprobs_V[token_id]), top=top)
