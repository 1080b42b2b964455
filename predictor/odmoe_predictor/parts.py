"""A shadow's parts: the store's model with its weights quantised, layer by layer. Knows no sequences and no caches."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from odmoe_model.quantize import (
    QuantizationReport,
    QuantizedLinear,
    Quantizer,
    Treated,
    kept_tensor,
    quantize_linears,
    treated_weight,
)
from odmoe_model.skeleton import load_skeleton
from odmoe_model.store import ExpertStore
from odmoe_predictor.config import Scope
from odmoe_predictor.experts import Progress, QuantizedExperts


@dataclass(frozen=True, kw_only=True)
class ShadowParts:
    """`body` without its experts, which go into its seam, and `head` over what it puts out."""

    body: nn.Module
    experts: QuantizedExperts
    head: nn.Module
    config: PreTrainedConfig
    report: QuantizationReport


def load_parts(
    store: ExpertStore,
    *,
    quantize: Quantizer,
    scope: Scope = "model",
    device: str = "cpu",
    on_progress: Progress | None = None,
) -> ShadowParts:
    """Quantise the store's model, or of it the routed experts only. Afterwards the store may be closed: nothing of
    its experts is kept."""
    model = load_skeleton(store, device=device)
    body = model.base_model
    experts = QuantizedExperts(store, body, quantize=quantize, device=torch.device(device), on_progress=on_progress)
    of_the_rest = quantize if scope == "model" else None
    head, treated_head = _quantized_head(model, body, of_the_rest)
    treated = [*experts.treated, *quantize_linears(body, of_the_rest), *treated_head]
    report = QuantizationReport(tuple(treated))
    return ShadowParts(body=body, experts=experts, head=head, config=model.config, report=report)


def _quantized_head(model: Any, body: nn.Module, quantize: Quantizer | None) -> tuple[nn.Module, list[Treated]]:
    """The output head and its entry; one that shares its weight with the body stays and is in the body's."""
    head: nn.Linear = model.get_output_embeddings()
    if any(head.weight is parameter for parameter in body.parameters()):
        return head, []
    if quantize is None:
        kept = [kept_tensor(tensor, what="output head", reason="not in the scope") for tensor in head.parameters()]
        return head, kept
    weight = quantize(head.weight.detach())
    bias = None if head.bias is None else head.bias.detach()
    treated = [treated_weight(head.weight, weight, what="output head")]
    if bias is not None:
        treated.append(kept_tensor(bias, what="norms, biases, tables", reason="vectors"))
    return QuantizedLinear(weight, bias), treated
