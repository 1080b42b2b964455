"""The `default` checkpoint: the dense parent upcycled into 8 experts, in Mixtral's architecture.

Knows the recipe: every expert is the parent's feed-forward network plus a trained delta of low rank, and the routers
are rows found by clustering. Does not know how they were trained (`deploy/default-model`).

Dimensions: E experts, R rank of a delta, O output, I input of a projection.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from odmoe_model.builtin.parent import DenseParent

DATA_FILE_NAME = "default-8x.safetensors"
NUM_EXPERTS = 8
EXPERTS_PER_TOKEN = 2
# Mixtral's names for the three projections: gate, down, up.
PROJECTIONS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def data_path() -> Path:
    """The routers and deltas that ship with the package."""
    return Path(__file__).parent / DATA_FILE_NAME


def expert_weight(base_OI: Tensor, *, a_RI: Tensor, b_RO: Tensor) -> Tensor:
    """Base plus the sum over ranks of b outer a, in bf16, with the same bits on every machine.

    A matrix product would be shorter, but the order in which a BLAS adds, and whether it fuses multiply and add,
    depends on the processor; the checkpoint's digest must not.
    """
    sum_OI = base_OI.to(torch.float32, copy=True)
    for a_I, b_O in zip(a_RI.float(), b_RO.float(), strict=True):
        product_OI = b_O[:, None] * a_I[None, :]
        sum_OI.add_(product_OI)
    return sum_OI.to(torch.bfloat16)


def config(parent: DenseParent) -> dict[str, Any]:
    """config.json of the checkpoint."""
    shape = parent.shape
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.hidden // shape.num_heads,
        "hidden_act": "silu",
        "max_position_embeddings": shape.context_tokens,
        "rms_norm_eps": shape.norm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_base},
        "num_local_experts": NUM_EXPERTS,
        "num_experts_per_tok": EXPERTS_PER_TOKEN,
        "tie_word_embeddings": True,
        "attention_dropout": 0.0,
        "sliding_window": None,
    }


def tensors_of(parent: DenseParent, layer: int) -> Iterator[tuple[str, Tensor]]:
    """One layer's tensors under the names Mixtral checkpoints carry."""
    prefix = f"model.layers.{layer}"
    with safe_open(data_path(), framework="pt") as data:
        yield f"{prefix}.block_sparse_moe.gate.weight", data.get_tensor(f"layers.{layer}.router").to(torch.bfloat16)
        for ours, theirs in PROJECTIONS.items():
            base_OI = parent.tensor(f"{prefix}.mlp.{theirs}.weight")
            a_ERI, b_ERO = (data.get_tensor(f"layers.{layer}.{ours}.{side}") for side in ("A", "B"))
            for expert in range(NUM_EXPERTS):
                name = f"{prefix}.block_sparse_moe.experts.{expert}.{ours}.weight"
                yield name, expert_weight(base_OI, a_RI=a_ERI[expert], b_RO=b_ERO[expert])
