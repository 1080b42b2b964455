"""What a request may want to hear of the tokens that go through the model: a prompt's log probabilities, and experts.

Knows lanes and one request; knows no model and no client. Nothing is kept that was not asked for.

T tokens, V vocabulary, L MoE layers, K experts a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from odmoe_server.engine_api import GenerationRequest, ReadPrompt, Token
from odmoe_server.moe.lanes import Lane

# Rows whose log probabilities are in memory together.
_ROWS: Final = 64


@dataclass(kw_only=True)
class Reader:
    """Of one sequence; used by the decode loop's thread only."""

    request: GenerationRequest
    _scored: list[Token] = field(default_factory=list)
    _experts: list[Tensor] = field(default_factory=list)

    def watch(self, lane: Lane) -> None:
        """Before a step: have the lane keep what is wanted of it."""
        lane.served = [] if self.request.routed_experts else None
        lane.keeps_logits = bool(self._answers_of(lane))

    def read_prompt(self, lane: Lane) -> None:
        """After a step that took some of the prompt."""
        if self.request.routed_experts:
            self._experts.append(experts_of(lane))
        if lane.logits_TV is not None:
            assert self.request.prompt_logprobs is not None, "then the lane keeps none"
            ids = self._answers_of(lane)
            self._scored += scored(lane.logits_TV[: len(ids)], ids, wanted=self.request.prompt_logprobs)
            lane.logits_TV = None

    def prompt(self) -> ReadPrompt:
        """After the last of them."""
        experts_TLK = torch.cat(self._experts) if self._experts else None
        self._experts = []
        if self.request.prompt_logprobs is None:
            return ReadPrompt(experts_TLK=experts_TLK)
        return ReadPrompt(tokens=(Token(self.request.prompt_ids[0]), *self._scored), experts_TLK=experts_TLK)

    def _answers_of(self, lane: Lane) -> Sequence[int]:
        """The prompt's tokens whose log probabilities the lane's logits have: for each of its own, the one behind."""
        if self.request.prompt_logprobs is None or not lane.is_prompt:
            return ()
        return self.request.prompt_ids[lane.position + 1 : lane.position + len(lane.ids) + 1]


def experts_of(lane: Lane) -> Tensor:
    """What computed a lane's tokens: int16 [T, L, K]."""
    assert lane.served is not None, "it was watched"
    return torch.stack(lane.served, dim=1).to("cpu", torch.int16)


def scored(logits_TV: Tensor, ids: Sequence[int], *, wanted: int) -> list[Token]:
    """These tokens, each with its log probability in its row, with its place, and with so many of the likeliest."""
    found: list[Token] = []
    for start in range(0, len(ids), _ROWS):
        logprobs_TV = logits_TV[start : start + _ROWS].to("cpu", torch.float32).log_softmax(dim=-1)
        own_T1 = logprobs_TV.gather(1, torch.tensor(ids[start : start + _ROWS]).unsqueeze(1))
        ranks_T = (logprobs_TV > own_T1).sum(dim=1) + 1
        best = logprobs_TV.topk(min(wanted, logprobs_TV.shape[1]))
        for row, token_id in enumerate(ids[start : start + _ROWS]):
            top = tuple(zip(best.indices[row].tolist(), best.values[row].tolist(), strict=True))
            found.append(Token(token_id, logprob=float(own_T1[row]), top=top, rank=int(ranks_T[row])))
    return found
