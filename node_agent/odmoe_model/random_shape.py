"""What a random checkpoint is to be, and the configuration its family has for that.

Knows what each supported family calls the numbers of experts and their size, and the least it must be told besides.
Writes nothing and makes no weights (`random_checkpoint`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from odmoe_model.family import SUPPORTED_FAMILIES

HEAD_SIZE: Final = 64


class RandomCheckpointError(ValueError):
    """A random checkpoint cannot be made; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class RandomShape:
    """`intermediate` is the inner width of each expert, and of dense and shared ones where a family has such.
    `heads` and `kv_heads`, left out, follow from `hidden`. `more` are settings of the family's own configuration;
    they win over all else."""

    family: str
    layers: int = 4
    experts: int = 8
    top_k: int = 2
    hidden: int = 512
    intermediate: int = 1024
    vocab: int = 4096
    context: int = 4096
    heads: int | None = None
    kv_heads: int | None = None
    dtype: Literal["fp32", "bf16"] = "fp32"
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_heads(self) -> int:
        return self.heads or max(1, self.hidden // HEAD_SIZE)

    @property
    def num_kv_heads(self) -> int:
        return self.kv_heads or (self.num_heads // 4 if self.num_heads % 4 == 0 else self.num_heads)

    @property
    def head_size(self) -> int:
        return self.hidden // self.num_heads


def random_config(shape: RandomShape, *, special_ids: Mapping[str, int]) -> PreTrainedConfig:
    """The family's configuration of this shape, every layer a MoE layer unless `more` says otherwise. Raises
    RandomCheckpointError when there is no such family, or none of this shape."""
    _refuse_senseless(shape)
    config_type = CONFIG_MAPPING[shape.family]
    known = set(config_type().to_dict()) | {"num_mtp_layers"}
    unknown = sorted(set(shape.more) - known)
    if unknown:
        raise RandomCheckpointError(f"the configuration of {shape.family} has no setting {unknown[0]!r}")
    settings = {**_common(shape), **_own(shape), **special_ids, **shape.more}
    try:
        return config_type(**settings)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise RandomCheckpointError(
            f"transformers refuses a {shape.family} of this shape: {str(error).strip()}"
        ) from error


def _refuse_senseless(shape: RandomShape) -> None:
    if shape.family not in SUPPORTED_FAMILIES:
        raise RandomCheckpointError(
            f"there is no family {shape.family!r}; supported are: {', '.join(SUPPORTED_FAMILIES)}"
        )
    for name in ("layers", "experts", "top_k", "hidden", "intermediate", "vocab", "context"):
        if getattr(shape, name) < 1:
            raise RandomCheckpointError(f"{name} must be at least 1, not {getattr(shape, name)}")
    if shape.top_k > shape.experts:
        raise RandomCheckpointError(f"a token cannot have {shape.top_k} of {shape.experts} experts")
    if shape.family == "phimoe" and shape.top_k != 2:
        raise RandomCheckpointError("the router of phimoe chooses 2 experts, never another number: use top-k 2")
    if shape.hidden % (shape.num_heads * 4) or shape.num_heads % shape.num_kv_heads:
        raise RandomCheckpointError(
            f"a hidden size of {shape.hidden} does not divide into {shape.num_heads} heads of a multiple of 4, "
            f"{shape.num_kv_heads} of them for keys and values; choose hidden, heads and kv-heads so that it does"
        )


def _common(shape: RandomShape) -> dict[str, Any]:
    return {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "max_position_embeddings": shape.context,
    }


def _own(shape: RandomShape) -> dict[str, Any]:
    """What the family calls its experts, and what else it must be told."""
    width = {"moe_intermediate_size": shape.intermediate}
    top_k = {"num_experts_per_tok": shape.top_k}
    local = {"num_local_experts": shape.experts, **top_k}
    named = {"num_experts": shape.experts, **top_k}
    routed = {"n_routed_experts": shape.experts, "n_shared_experts": 1, "first_k_dense_replace": 0, **top_k, **width}
    ungrouped = {"n_group": 1, "topk_group": 1}
    per_head = {"head_dim": shape.head_size}
    own: dict[str, dict[str, Any]] = {
        "deepseek_v2": {**routed, **_latent(shape), "topk_method": "greedy"},
        "deepseek_v3": {**routed, **_latent(shape), **ungrouped, "num_mtp_layers": 0},
        "ernie4_5_moe": {
            "moe_num_experts": shape.experts,
            "moe_k": shape.top_k,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 0,
            **width,
        },
        "glm4_moe": {**routed, **ungrouped, **per_head, "num_mtp_layers": 0},
        # Its default stretches a context of 4096; here the context is what was asked for.
        "gpt_oss": {**local, **per_head, "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0}},
        "granitemoe": local,
        "lfm2_moe": {
            **named,
            **width,
            "num_dense_layers": 0,
            "layer_types": [("full_attention", "conv")[layer % 2] for layer in range(shape.layers)],
        },
        "mixtral": {**local, **per_head},
        "olmoe": named,
        "phimoe": local,
        "qwen2_moe": {**named, **width, "shared_expert_intermediate_size": shape.intermediate},
        "qwen3_moe": {**named, **width, **per_head, "norm_topk_prob": True},
    }
    return own[shape.family]


def _latent(shape: RandomShape) -> dict[str, Any]:
    """Multi-head latent attention in the proportions of DeepSeek's models."""
    return {
        "num_key_value_heads": shape.num_heads,
        "kv_lora_rank": max(8, shape.hidden // 8),
        "q_lora_rank": max(8, shape.hidden // 4),
        "qk_nope_head_dim": shape.head_size,
        "qk_rope_head_dim": shape.head_size // 2,
        "v_head_dim": shape.head_size,
    }
