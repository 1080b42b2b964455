"""What a gate thinks of all experts, not only of those it chooses: from its logits, as each family makes them.

Two numbers an expert: its score, by which the gate ranks (with the correction bias where a family has one, and minus
infinity in groups the gate has closed for the token), and its weight before the family divides by the chosen ones' sum
or multiplies by a constant. Nothing of the gate's choice is computed again: index and weights stay the gate's own.

T token rows, E experts, G groups of experts.
"""

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from odmoe_model.routers import Router

_SIGMOID: Final = frozenset({"deepseek_v3", "glm4_moe", "lfm2_moe"})
# Weights of the chosen are divided by their sum, whatever the configuration says.
_ALWAYS_NORMALISED: Final = frozenset({"mixtral", "gpt_oss", "granitemoe", "phimoe", "ernie4_5_moe"})
# How many of a group's best experts speak for it.
_GROUP_VOICES: Final = {"deepseek_v2": 1, "deepseek_v3": 2, "glm4_moe": 2}


@dataclass(frozen=True, slots=True)
class Scores:
    """Of every expert for every token row: what it is ranked by, and its weight in the unit of its row."""

    score_TE: Tensor
    weight_TE: Tensor


class Scorer:
    """Of one MoE layer's gate. `bias` is what it adds when it ranks; `normalised`: the weights of a token's experts are
    held to a fixed sum."""

    def __init__(self, router: Router, *, family: str) -> None:
        self._module: Any = router.module
        self._family = family
        self.bias = _bias(router, family)
        self.normalised = family in _ALWAYS_NORMALISED or bool(getattr(self._module, "norm_topk_prob", False))

    def __call__(self, logits_TE: Tensor) -> Scores:
        """From the gate's own logits."""
        logits_TE = logits_TE.float()
        weight_TE = logits_TE.sigmoid() if self._family in _SIGMOID else logits_TE.softmax(dim=-1)
        score_TE = weight_TE if self.bias is None else weight_TE + self.bias
        return Scores(self._closed(score_TE), weight_TE)

    def _closed(self, score_TE: Tensor) -> Tensor:
        """Experts outside the groups the gate chooses among for a token cannot be chosen."""
        voices = _GROUP_VOICES.get(self._family)
        groups = getattr(self._module, "num_group", None)
        if voices is None or getattr(self._module, "topk_method", "") == "greedy" or groups in (None, 1):
            return score_TE
        score_TGN = score_TE.view(score_TE.shape[0], groups, -1)
        voice_TG = score_TGN.topk(voices, dim=-1).values.sum(dim=-1)
        open_TG = torch.zeros_like(voice_TG, dtype=torch.bool)
        open_TG.scatter_(1, voice_TG.topk(self._module.topk_group, dim=-1, sorted=False).indices, True)
        return score_TGN.masked_fill(~open_TG[..., None], float("-inf")).view_as(score_TE)


def _bias(router: Router, family: str) -> Tensor | None:
    if family == "lfm2_moe":
        return router.extra[0]
    if family == "ernie4_5_moe":
        bias: Tensor = router.module.moe_statics.e_score_correction_bias
        return bias.squeeze()
    return getattr(router.module, "e_score_correction_bias", None)
