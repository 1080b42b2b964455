"""The upcycled feed-forward layer as it is trained: one shared base, low-rank deltas per expert.

Knows how to compute 8 experts at nearly the price of one: all share the base projections, which are computed once per
token, and only the low-rank parts differ per chosen expert. Does not know losses, data or optimisers. The same numbers
come out of the built checkpoint, where base and delta are added up (`odmoe_model.builtin.default`).

Dimensions: T tokens, H hidden, F inner width, E experts, R rank, S = E*R stacked ranks.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

NUM_EXPERTS = 8
EXPERTS_PER_TOKEN = 2
RANK = 4
PROJECTIONS = ("w1", "w2", "w3")  # gate, down, up: Mixtral's names

Mode = Literal["dense", "untrained", "routed"]


class UpcycledMlp(nn.Module):
    """Stands in for a LlamaMLP; its base weights stay frozen, its deltas are the only parameters."""

    def __init__(self, base: LlamaMLP) -> None:
        super().__init__()
        self.gate_up_FH = torch.cat([base.gate_proj.weight, base.up_proj.weight]).detach()
        self.down_HF = base.down_proj.weight.detach()
        ffn, hidden = base.gate_proj.weight.shape
        self.router_EH = torch.zeros(NUM_EXPERTS, hidden)
        self.a = nn.ParameterDict()
        self.b = nn.ParameterDict()
        for name, (inputs, outputs) in {"w1": (hidden, ffn), "w2": (ffn, hidden), "w3": (hidden, ffn)}.items():
            self.a[name] = nn.Parameter(torch.randn(NUM_EXPERTS, RANK, inputs) * inputs**-0.5)
            self.b[name] = nn.Parameter(torch.zeros(NUM_EXPERTS, RANK, outputs))
        self.mode: Mode = "routed"
        self.random_T: Tensor | None = None  # marks tokens whose experts are drawn at random

    def forward(self, x: Tensor) -> Tensor:
        x_TH = x.reshape(-1, x.shape[-1])
        gate_TF, up_TF = functional.linear(x_TH, self.gate_up_FH).chunk(2, dim=-1)
        if self.mode == "dense":
            return functional.linear(functional.silu(gate_TF) * up_TF, self.down_HF).view_as(x)
        chosen_TK, weights_TK = self.route(x_TH)
        return self._experts(x_TH, gate_TF, up_TF, chosen_TK, weights_TK).view_as(x)

    def route(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        """Mixtral's rule: softmax over the chosen logits. Marked tokens get experts by lot, with the same weights."""
        logits_TE = functional.linear(x_TH, self.router_EH.to(x_TH.dtype)).float()
        top_TK, chosen_TK = logits_TE.topk(EXPERTS_PER_TOKEN, dim=-1)
        if self.random_T is not None:
            drawn_TK = torch.rand_like(logits_TE).topk(EXPERTS_PER_TOKEN, dim=-1).indices
            chosen_TK = torch.where(self.random_T[:, None], drawn_TK, chosen_TK)
        return chosen_TK, top_TK.softmax(dim=-1)

    def _experts(self, x_TH: Tensor, gate_TF: Tensor, up_TF: Tensor, chosen_TK: Tensor, weights_TK: Tensor) -> Tensor:
        dtype = x_TH.dtype
        a = {name: value.to(dtype).flatten(0, 1) for name, value in self.a.items()}
        b = {name: value.to(dtype).flatten(0, 1) for name, value in self.b.items()}
        if self.mode == "untrained":
            b = {name: torch.zeros_like(value) for name, value in b.items()}
        gate_TS, up_TS = functional.linear(x_TH, torch.cat([a["w1"], a["w3"]])).chunk(2, dim=-1)
        mixed_TF, down_TS = torch.zeros_like(gate_TF), torch.zeros_like(gate_TS)
        for k in range(EXPERTS_PER_TOKEN):
            mask_TS = functional.one_hot(chosen_TK[:, k], NUM_EXPERTS).to(dtype).repeat_interleave(RANK, dim=1)
            weight_T1 = weights_TK[:, k, None].to(dtype)
            gate_k_TF = torch.addmm(gate_TF, gate_TS * mask_TS, b["w1"])
            up_k_TF = torch.addmm(up_TF, up_TS * mask_TS, b["w3"])
            inner_TF = functional.silu(gate_k_TF) * up_k_TF * weight_T1
            low_TS = functional.linear(inner_TF, a["w2"]) * mask_TS
            mixed_TF = mixed_TF + inner_TF
            down_TS = down_TS + low_TS
        return torch.addmm(functional.linear(mixed_TF, self.down_HF), down_TS, b["w2"])


def upcycle(model: LlamaForCausalLM) -> list[UpcycledMlp]:
    """Replace every feed-forward network of the dense model, in place."""
    mlps = []
    for layer in model.model.layers:
        layer.mlp = UpcycledMlp(layer.mlp)
        mlps.append(layer.mlp)
    return mlps


def set_mode(mlps: list[UpcycledMlp], mode: Mode, *, random_T: Tensor | None = None) -> None:
    """How all layers compute from now on."""
    for mlp in mlps:
        mlp.mode, mlp.random_T = mode, random_T


def to_tensors(mlps: list[UpcycledMlp]) -> dict[str, Tensor]:
    """Routers and deltas in the form that ships with the package: bf16, by layer and projection."""
    tensors: dict[str, Tensor] = {}
    for n, mlp in enumerate(mlps):
        tensors[f"layers.{n}.router"] = mlp.router_EH
        for name in PROJECTIONS:
            tensors[f"layers.{n}.{name}.A"], tensors[f"layers.{n}.{name}.B"] = mlp.a[name], mlp.b[name]
    return {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}


def load_tensors(mlps: list[UpcycledMlp], tensors: dict[str, Tensor]) -> None:
    """Take routers and deltas over from the shipped form."""
    for n, mlp in enumerate(mlps):
        mlp.router_EH = tensors[f"layers.{n}.router"].float()
        for name in PROJECTIONS:
            mlp.a[name].data = tensors[f"layers.{n}.{name}.A"].float()
            mlp.b[name].data = tensors[f"layers.{n}.{name}.B"].float()
