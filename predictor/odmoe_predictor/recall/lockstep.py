"""A model that takes one token of each of many sequences at a time. Knows no quantisation, alignment or answers.

Shape suffixes: B sequences, b those still in the batch, S slots, L MoE layers, K experts a token, H hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from odmoe_model import seam
from odmoe_model.experts import ExpertMaths
from odmoe_model.skeleton import load_skeleton
from odmoe_model.store import ExpertStore
from odmoe_predictor.parts import ShadowParts
from odmoe_predictor.recall.slabs import SlabCache


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Where sequences lie in their slots: prompts of `lengths_B` tokens end before slot `width`."""

    lengths_B: Tensor
    width: int

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]]) -> "Batch":
        """Of the prompts, none of them empty."""
        lengths = [len(prompt) for prompt in prompts]
        return cls(lengths_B=torch.tensor(lengths), width=max(lengths))

    def seen(self, rows_b: Tensor, *, slots: int) -> Tensor:
        """Which of the first slots hold something, bool [b, S]."""
        return torch.arange(slots) >= (self.width - self.lengths_B[rows_b])[:, None]

    def positions(self, rows_b: Tensor, *, step: int) -> Tensor:
        """The position [b] of each sequence's token `step`, counted from the prompt's end."""
        return self.lengths_B[rows_b] + step


@dataclass(frozen=True, kw_only=True)
class Stepped:
    """What a step found: the final hidden state, the experts of each layer, and what their gates saw."""

    hidden_bH: Tensor
    routed_LbK: Tensor
    inputs_LbH: list[Tensor]


class LockstepModel:
    """A model without its experts, the experts, and the output head."""

    def __init__(self, body: nn.Module, *, head: nn.Module, config: Any, experts: seam.Handler) -> None:
        self._body, self._head, self._config, self._experts = body, head, config, experts
        self._calls: list[seam.ExpertsCall] = []
        seam.install(body, self._on_experts)

    def prefill(self, tokens: Sequence[int]) -> tuple[SlabCache, int]:
        """One prompt by itself, as a server would do it: its keys and values, and the greedy next token."""
        cache = SlabCache.for_model(self._config, slots=len(tokens))
        output = self._body(input_ids=torch.tensor([list(tokens)]), past_key_values=cache, use_cache=True)
        self._calls.clear()
        return cache, int(self._head(output.last_hidden_state[0, -1]).argmax())

    def step(self, tokens_b: Tensor, *, cache: SlabCache, batch: Batch, rows_b: Tensor, step: int) -> Stepped:
        """Token `step` of the sequences `rows_b`, which goes into the cache's next slot."""
        slots = batch.width + step
        cache.fill_to(slots)
        output = self._body(
            input_ids=tokens_b[:, None],
            attention_mask=batch.seen(rows_b, slots=slots + 1),
            position_ids=batch.positions(rows_b, step=step)[:, None],
            past_key_values=cache,
            use_cache=True,
        )
        calls, self._calls = self._calls, []
        return Stepped(
            hidden_bH=output.last_hidden_state[:, -1],
            routed_LbK=torch.stack([call.index_TK for call in calls]),
            inputs_LbH=[call.x_TH for call in calls],
        )

    def greedy(self, hidden_bH: Tensor) -> Tensor:
        """The most likely next tokens, int64 [b]."""
        tokens_b: Tensor = self._head(hidden_bH).argmax(dim=-1)
        return tokens_b

    def _on_experts(self, call: seam.ExpertsCall) -> Tensor:
        self._calls.append(call)
        return self._experts(call)


def full_model(store: ExpertStore) -> LockstepModel:
    """The store's own model; its experts are computed on the store's pages."""
    model: Any = load_skeleton(store, device="cpu")
    maths = ExpertMaths(store.manifest)

    def experts(call: seam.ExpertsCall) -> Tensor:
        groups = seam.group_rows(call.index_TK)
        outputs = {
            expert: maths.rows(store.fields(store.record(call.layer, expert)), call.x_TH[token_N])
            for expert, (token_N, _) in groups.items()
        }
        return seam.combine(call.x_TH, call.weight_TK, groups, outputs)

    return LockstepModel(model.base_model, head=model.get_output_embeddings(), config=model.config, experts=experts)


def shadow_model(parts: ShadowParts) -> LockstepModel:
    """The modules of a shadow."""
    return LockstepModel(parts.body, head=parts.head, config=parts.config, experts=parts.experts)
