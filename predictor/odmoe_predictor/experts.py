"""The shadow's experts: every expert of every layer, quantised out of the store, and what they do to rows.

One expert at a time is there in full precision. Knows the family only by the attributes its own experts class has.

Shape suffixes: T token rows, N rows of one expert, H hidden size, G gate and up together, I intermediate size.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from odmoe_model.family import experts_modules
from odmoe_model.quantize import (
    QuantizedWeight,
    Quantizer,
    Treated,
    kept_tensor,
    merge,
    treated_weight,
)
from odmoe_model.seam import ExpertsCall, combine, group_rows
from odmoe_model.store import ExpertStore

# Called with the number of layers done and of all layers.
Progress = Callable[[int, int], None]


class QuantizedExpert:
    """One expert: its matrices quantised, its biases as they were."""

    def __init__(self, fields: dict[str, Tensor], module: Any, *, quantize: Quantizer, device: torch.device) -> None:
        self.weights: dict[str, QuantizedWeight] = {}
        self.biases: dict[str, Tensor] = {}
        self.treated: list[Treated] = []
        for name, tensor in fields.items():
            if tensor.ndim == 1:
                # Out of the mapped file, so that the store can be let go of.
                self.biases[name] = tensor.to(device, copy=True)
                self.treated.append(kept_tensor(tensor, what="expert biases", reason="vectors"))
                continue
            weight_NK = (tensor.T if module.is_transposed else tensor).to(device)
            self.weights[name] = quantize(weight_NK)
            self.treated.append(treated_weight(tensor, self.weights[name], what="experts"))

    def rows(self, module: Any, x_NH: Tensor) -> Tensor:
        """The unweighted output [N, H]; `module` lends its activation and gating."""
        if module.has_gate:
            h_NI = module._apply_gate(self._linear("gate_up_proj", x_NH))
        else:
            h_NI = module.act_fn(self._linear("up_proj", x_NH))
        return self._linear("down_proj", h_NI)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        y = self.weights[name].linear(x)
        bias = self.biases.get(f"{name}_bias")
        return y if bias is None else y + bias


class QuantizedExperts:
    """All experts of a store by layer; `treated` says what became of their weights."""

    def __init__(
        self,
        store: ExpertStore,
        model: nn.Module,
        *,
        quantize: Quantizer,
        device: torch.device,
        on_progress: Progress | None = None,
    ) -> None:
        """`model` is the store's skeleton: its experts modules say how a family's records are laid out."""
        modules = [module for _, module in experts_modules(model)]
        self.treated: list[Treated] = []
        self._layers: list[list[QuantizedExpert]] = []
        for layer, module in enumerate(modules):
            experts = []
            for expert in range(store.manifest.num_experts):
                fields = store.fields(store.record(layer, expert))
                experts.append(QuantizedExpert(fields, module, quantize=quantize, device=device))
                self.treated = merge(self.treated + experts[-1].treated)
            self._layers.append(experts)
            if on_progress is not None:
                on_progress(layer + 1, len(modules))

    def __call__(self, call: ExpertsCall) -> Tensor:
        """The weighted sum [T, H] of the experts a layer's router chose."""
        experts, module = self._layers[call.layer], call.module
        if call.x_TH.shape[0] == 1:
            return self._one_token(call, experts)
        groups = group_rows(call.index_TK)
        outputs = {expert: experts[expert].rows(module, call.x_TH[token_N]) for expert, (token_N, _) in groups.items()}
        return combine(call.x_TH, call.weight_TK, groups, outputs)

    def _one_token(self, call: ExpertsCall, experts: list[QuantizedExpert]) -> Tensor:
        """The common case without the sorting of rows, which costs as much as a small expert. Adds as `combine`
        does: in bfloat16 another order or a wider sum would send some tokens to other experts in later layers."""
        out_TH = torch.zeros_like(call.x_TH)
        chosen: list[int] = call.index_TK[0].tolist()
        for expert, place in sorted(zip(chosen, range(len(chosen)), strict=True)):
            rows_TH = experts[expert].rows(call.module, call.x_TH) * call.weight_TK[:, place, None]
            out_TH += rows_TH.to(out_TH.dtype)
        return out_TH
