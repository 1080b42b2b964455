"""The seam in transformers through which a model asks for its experts. Knows no weights and no network.

`install` makes each MoE layer call a handler; `group_rows` and `combine` are the two halves of what a family's
eager experts do around the mathematics of the single expert, to the bit.

Shape suffixes: T token rows, H hidden size, K experts a token, N rows of one expert.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from odmoe_model.family import experts_modules

IMPLEMENTATION: Final = "odmoe"
_SEAM_ATTRIBUTE: Final = "_odmoe_seam"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertsCall:
    """One MoE layer has routed its rows and wants its experts' weighted sum, [T, H]. `layer` is the ordinal of
    the MoE layer, `module` the layer's experts module (its parameters may be on the meta device)."""

    layer: int
    module: nn.Module
    x_TH: Tensor
    index_TK: Tensor
    weight_TK: Tensor


Handler = Callable[[ExpertsCall], Tensor]
# Expert -> (its token rows, the place 0..K-1 it has among each token's experts), both [N].
Groups = dict[int, tuple[Tensor, Tensor]]


def install(model: Any, handler: Handler) -> int:
    """Let `handler` compute the experts of every MoE layer of the transformers model.

    Returns the number of MoE layers. A later call replaces the handler; `model.set_experts_implementation`
    with another name takes it out."""
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts_forward)
    model.set_experts_implementation(IMPLEMENTATION)
    modules = experts_modules(model)
    for layer, (_, module) in enumerate(modules):
        setattr(module, _SEAM_ATTRIBUTE, _Seam(layer=layer, handler=handler))
    return len(modules)


def group_rows(index_TK: Tensor) -> Groups:
    """Which rows each expert has to do: experts ascending; rows as eager orders them, by place, then by token."""
    num_tokens = index_TK.shape[0]
    if num_tokens == 1:
        return _group_row(index_TK)
    expert_S, order_S = torch.sort(index_TK.t().reshape(-1), stable=True)
    place_S, token_S = order_S // num_tokens, order_S % num_tokens
    experts, counts = torch.unique_consecutive(expert_S, return_counts=True)
    sizes: list[int] = counts.tolist()
    return dict(
        zip(experts.tolist(), zip(torch.split(token_S, sizes), torch.split(place_S, sizes), strict=True), strict=True)
    )


def combine(x_TH: Tensor, weight_TK: Tensor, groups: Groups, outputs: Mapping[int, Tensor]) -> Tensor:
    """The weighted sum [T, H] of the experts' unweighted outputs [N, H], in ascending order of experts as eager
    sums them; dtype and device are those of `x_TH`."""
    out_TH = torch.zeros_like(x_TH)
    if x_TH.shape[0] == 1:
        for expert, (_, place_N) in groups.items():
            out_TH += (outputs[expert] * weight_TK.index_select(1, place_N)).to(out_TH.dtype)
        return out_TH
    for expert, (token_N, place_N) in groups.items():
        weighted_NH = outputs[expert] * weight_TK[token_N, place_N, None]
        out_TH.index_add_(0, token_N, weighted_NH.to(out_TH.dtype))
    return out_TH


def _group_row(index_TK: Tensor) -> Groups:
    """`group_rows` of a single token, as in most steps, in half the time."""
    experts: list[int] = index_TK[0].tolist()
    order = sorted(range(len(experts)), key=experts.__getitem__)
    place_S = torch.tensor(order, device=index_TK.device)
    token_N = torch.zeros(1, dtype=torch.long, device=index_TK.device)
    return {experts[place]: (token_N, place_N) for place, place_N in zip(order, torch.split(place_S, 1), strict=True)}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Seam:
    layer: int
    handler: Handler


def _experts_forward(module: nn.Module, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """What transformers calls in place of the experts' own forward."""
    seam: Any = getattr(module, _SEAM_ATTRIBUTE)
    call = ExpertsCall(layer=seam.layer, module=module, x_TH=x_TH, index_TK=index_TK, weight_TK=weight_TK)
    output_TH: Tensor = seam.handler(call)
    return output_TH
