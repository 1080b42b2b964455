"""The `partitioned` checkpoint: the dense parent's neurons dealt out to disjoint experts, in Qwen2-MoE's architecture.

Knows the recipe: per layer, 1024 neurons form the shared expert and the rest 16 experts of 32 neurons, of which 8 are
chosen per token. Nothing is trained; half the routed neurons are left out at each token, so the model is worse than
its parent. It exists because here leaving an expert out or swapping it shows. Does not know how neurons were grouped
(`deploy/default-model/partition.py`).

Dimensions: F neurons of the parent, f neurons of one expert, H hidden, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from odmoe_model.builtin.parent import DenseParent

DATA_FILE_NAME = "partitioned-16x.safetensors"
NUM_EXPERTS = 16
EXPERTS_PER_TOKEN = 8
EXPERT_NEURONS = 32
SHARED_NEURONS = 1024
SHARED_GROUP = -1  # the group number of neurons that belong to the shared expert


def data_path() -> Path:
    """The groups and routers that ship with the package."""
    return Path(__file__).parent / DATA_FILE_NAME


def config(parent: DenseParent) -> dict[str, Any]:
    """config.json of the checkpoint."""
    shape = parent.shape
    return {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "moe_intermediate_size": EXPERT_NEURONS,
        "shared_expert_intermediate_size": SHARED_NEURONS,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": shape.context_tokens,
        "rms_norm_eps": shape.norm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_base},
        "num_experts": NUM_EXPERTS,
        "num_experts_per_tok": EXPERTS_PER_TOKEN,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "qkv_bias": False,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "attention_dropout": 0.0,
    }


def tensors_of(parent: DenseParent, layer: int) -> Iterator[tuple[str, Tensor]]:
    """One layer's tensors under the names Qwen2-MoE checkpoints carry."""
    prefix = f"model.layers.{layer}.mlp"
    with safe_open(data_path(), framework="pt") as data:
        group_F = data.get_tensor(f"layers.{layer}.group")
        router_EH = data.get_tensor(f"layers.{layer}.router")
    yield f"{prefix}.gate.weight", router_EH.to(torch.bfloat16)
    # The gate of the shared expert is a sigmoid: zero weights make it one half, and the doubled projection undoes it.
    yield f"{prefix}.shared_expert_gate.weight", torch.zeros(1, parent.shape.hidden, dtype=torch.bfloat16)
    dense = {kind: parent.tensor(f"{prefix}.{kind}_proj.weight") for kind in ("gate", "up", "down")}
    for group in (SHARED_GROUP, *range(NUM_EXPERTS)):
        shared = group == SHARED_GROUP
        # The weights of the chosen experts add up to one and are nearly equal; times their number, each counts fully.
        down_scale = 2 if shared else EXPERTS_PER_TOKEN
        name = f"{prefix}.shared_expert" if shared else f"{prefix}.experts.{group}"
        for kind, weight in cut(dense, (group_F == group).nonzero()[:, 0], down_scale=down_scale).items():
            yield f"{name}.{kind}_proj.weight", weight


def cut(dense: dict[str, Tensor], neurons_f: Tensor, *, down_scale: int) -> dict[str, Tensor]:
    """The part of a feed-forward network that some of its neurons make up, in bf16."""
    down_Hf = dense["down"][:, neurons_f] * down_scale  # a power of two: exact in bf16
    parts = {"gate": dense["gate"][neurons_f], "up": dense["up"][neurons_f], "down": down_Hf}
    return {kind: part.to(torch.bfloat16).contiguous() for kind, part in parts.items()}
