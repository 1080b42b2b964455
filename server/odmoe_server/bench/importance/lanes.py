"""A plain transformers model of a store, resident, that takes one token of each of many lanes a step.

Lanes are independent sequences; at each MoE layer the caller hears what every gate says and tells which experts each
lane really uses. Knows no slots and no policy.

Shape suffixes: B lanes, P tokens of a prompt, T token rows, E experts, K experts a token, H hidden size, N rows of one
expert, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from odmoe_model import seam
from odmoe_model.experts import ExpertMaths
from odmoe_model.routers import Router, routers_of
from odmoe_model.scores import Scorer, Scores
from odmoe_model.skeleton import load_skeleton
from odmoe_model.store import ExpertStore


@dataclass(frozen=True, kw_only=True, slots=True)
class Ahead:
    """What the next layer's gate says of this layer's rows: a cheap prediction of what it will say of its own."""

    index_TK: Tensor
    scores: Scores


@dataclass(frozen=True, kw_only=True, slots=True)
class Gated:
    """What the gate of one layer said of its rows `x_TH`; nothing is `ahead` of the last layer."""

    layer: int
    x_TH: Tensor
    index_TK: Tensor
    weight_TK: Tensor
    scores: Scores
    ahead: Ahead | None


# The experts and their weights to use, both [T, K]; what came in, unless something is replaced.
Decide = Callable[[Gated], tuple[Tensor, Tensor]]


def as_gated(gated: Gated) -> tuple[Tensor, Tensor]:
    """Replace nothing."""
    return gated.index_TK, gated.weight_TK


class LaneModel:
    """Experts stay in the store's pages; `decide` is asked at every MoE layer. `normalised`: the weights of a token's
    experts are held to a fixed sum."""

    def __init__(self, store: ExpertStore) -> None:
        manifest = store.manifest
        self._model: Any = load_skeleton(store, device="cpu")
        self._maths = ExpertMaths(manifest)
        self._fields = [
            [store.fields(store.record(layer, expert)) for expert in range(manifest.num_experts)]
            for layer in range(manifest.num_moe_layers)
        ]
        self._routers = routers_of(self._model, family=manifest.model_type)
        self._scorers = [Scorer(router, family=manifest.model_type) for router in self._routers]
        self._logits: list[Tensor | None] = [None] * len(self._routers)
        for layer, router in enumerate(self._routers):
            router.module.register_forward_hook(self._hear(layer))
        seam.install(self._model, self._experts)
        self.normalised = self._scorers[0].normalised
        self.decide: Decide = as_gated

    @torch.inference_mode()
    def prompt(self, tokens_BP: Tensor) -> DynamicCache:
        """The cache behind prompts of one length."""
        cache = DynamicCache(config=self._model.config)
        self._model(input_ids=tokens_BP, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    @torch.inference_mode()
    def step(self, tokens_B: Tensor, cache: DynamicCache) -> Tensor:
        """The logits [B, V] after one more token of each lane."""
        output = self._model(input_ids=tokens_B[:, None], past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits_BV: Tensor = output.logits[:, -1]
        return logits_BV

    def rows(self, layer: int, expert: int, x_NH: Tensor) -> Tensor:
        """What one expert makes of rows, unweighted [N, H]."""
        return self._maths.rows(self._fields[layer][expert], x_NH)

    def _hear(self, layer: int) -> Callable[..., None]:
        def hear(_: nn.Module, __: Any, output: tuple[Tensor, ...]) -> None:
            self._logits[layer] = output[0]

        return hear

    def _experts(self, call: seam.ExpertsCall) -> Tensor:
        logits_TE = self._logits[call.layer]
        assert logits_TE is not None, "a gate speaks before its experts are asked for"
        gated = Gated(
            layer=call.layer,
            x_TH=call.x_TH,
            index_TK=call.index_TK,
            weight_TK=call.weight_TK,
            scores=self._scorers[call.layer](logits_TE),
            ahead=self._ahead(call.layer + 1, call.x_TH),
        )
        index_TK, weight_TK = self.decide(gated)
        groups = seam.group_rows(index_TK)
        outputs = {expert: self.rows(call.layer, expert, call.x_TH[token_N]) for expert, (token_N, _) in groups.items()}
        return seam.combine(call.x_TH, weight_TK, groups, outputs)

    def _ahead(self, layer: int, x_TH: Tensor) -> Ahead | None:
        if layer == len(self._routers):
            return None
        logits_TE, index_TK = _asked(self._routers[layer], x_TH)
        return Ahead(index_TK=index_TK, scores=self._scorers[layer](logits_TE))


def _asked(router: Router, x_TH: Tensor) -> tuple[Tensor, Tensor]:
    """What a gate says, without its hooks hearing it."""
    logits_TE, _, index_TK = router.module.forward(x_TH, *router.extra)
    return logits_TE, index_TK
