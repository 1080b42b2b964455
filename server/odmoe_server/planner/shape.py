"""What the timing model needs to know of a model: counts and bytes. Knows no machine and reads no weights.

Shapes with a name are those of published configurations; any other model is described by its prepared store.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from odmoe_model.manifest import read_manifest
from odmoe_wire.checks import ITEMSIZE_BYTES


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Counts and bytes of a model; `layers` counts those with experts. `main_bytes` is what the main node reads
    for a token: all that is no routed expert, without the table of input embeddings."""

    name: str
    layers: int
    hidden_size: int
    num_experts: int
    top_k: int
    expert_bytes: int
    non_expert_bytes: int
    main_bytes: int
    kv_bytes_per_token: int
    weight_bits: int

    @property
    def experts_bytes(self) -> int:
        """All routed experts of all layers."""
        return self.layers * self.num_experts * self.expert_bytes

    @property
    def row_bytes(self) -> int:
        """One token's hidden state on the network."""
        return self.hidden_size * max(2, self.weight_bits // 8)


@dataclass(frozen=True, kw_only=True)
class _Published:
    """Counts of parameters, from a published configuration. `attention` is of one decoder layer."""

    layers: int
    dense_layers: int
    hidden_size: int
    vocab_size: int
    num_experts: int
    top_k: int
    expert: int
    shared_expert: int
    dense_mlp: int
    attention: int
    kv_values: int


def _grouped_query_attention(*, hidden_size: int, heads: int, kv_heads: int, head_dim: int) -> int:
    return hidden_size * head_dim * (2 * heads + 2 * kv_heads)


# 128 heads; queries by way of 1536 values, keys and values by way of 512 and 64 rotary ones.
_DEEPSEEK_V3_ATTENTION = 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168

_PUBLISHED: Mapping[str, _Published] = {
    "mixtral-8x7b": _Published(
        layers=32,
        dense_layers=0,
        hidden_size=4096,
        vocab_size=32000,
        num_experts=8,
        top_k=2,
        expert=3 * 4096 * 14336,
        shared_expert=0,
        dense_mlp=0,
        attention=_grouped_query_attention(hidden_size=4096, heads=32, kv_heads=8, head_dim=128),
        kv_values=2 * 8 * 128,
    ),
    "qwen3-235b-a22b": _Published(
        layers=94,
        dense_layers=0,
        hidden_size=4096,
        vocab_size=151936,
        num_experts=128,
        top_k=8,
        expert=3 * 4096 * 1536,
        shared_expert=0,
        dense_mlp=0,
        attention=_grouped_query_attention(hidden_size=4096, heads=64, kv_heads=4, head_dim=128),
        kv_values=2 * 4 * 128,
    ),
    "deepseek-v3": _Published(
        layers=58,
        dense_layers=3,
        hidden_size=7168,
        vocab_size=129280,
        num_experts=256,
        top_k=8,
        expert=3 * 7168 * 2048,
        shared_expert=3 * 7168 * 2048,
        dense_mlp=3 * 7168 * 18432,
        attention=_DEEPSEEK_V3_ATTENTION,
        kv_values=512 + 64,
    ),
}
NAMES: tuple[str, ...] = tuple(_PUBLISHED)


def named(name: str, *, weight_bits: int) -> Shape:
    """The shape of a published model with weights of that many bits. Raises ValueError for an unknown name."""
    if name not in _PUBLISHED:
        raise ValueError(f"there is no shape {name!r}; there are {', '.join(NAMES)}, or describe a store with --model")
    model = _PUBLISHED[name]
    decoder_layers = model.layers + model.dense_layers
    routers = model.layers * model.hidden_size * model.num_experts
    read = (
        decoder_layers * model.attention
        + model.layers * model.shared_expert
        + model.dense_layers * model.dense_mlp
        + routers
        + model.vocab_size * model.hidden_size
    )
    return Shape(
        name=f"{name}, {weight_bits} bits",
        layers=model.layers,
        hidden_size=model.hidden_size,
        num_experts=model.num_experts,
        top_k=model.top_k,
        expert_bytes=model.expert * weight_bits // 8,
        non_expert_bytes=(read + model.vocab_size * model.hidden_size) * weight_bits // 8,
        main_bytes=read * weight_bits // 8,
        kv_bytes_per_token=decoder_layers * model.kv_values * max(2, weight_bits // 8),
        weight_bits=weight_bits,
    )


def of_store(directory: Path) -> Shape:
    """The shape of a prepared store. Raises StoreError (a ValueError) if there is none."""
    from odmoe_model.family import build_config  # slow to import, and only needed here

    manifest = read_manifest(directory)
    config, item_bytes = build_config(manifest.config), ITEMSIZE_BYTES[manifest.dtype]
    embeddings_bytes = config.vocab_size * manifest.hidden_size * item_bytes
    return Shape(
        name=str(directory),
        layers=manifest.num_moe_layers,
        hidden_size=manifest.hidden_size,
        num_experts=manifest.num_experts,
        top_k=manifest.top_k,
        expert_bytes=manifest.record_bytes,
        non_expert_bytes=manifest.non_expert.bytes,
        main_bytes=manifest.non_expert.bytes - (0 if config.tie_word_embeddings else embeddings_bytes),
        kv_bytes_per_token=config.num_hidden_layers * _kv_values(config) * item_bytes,
        weight_bits=8 * item_bytes,
    )


def _kv_values(config: Any) -> int:
    """Values one token leaves in the cache of one layer; `config` is a transformers configuration."""
    if getattr(config, "kv_lora_rank", None):
        return int(config.kv_lora_rank + config.qk_rope_head_dim)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_key_value_heads * head_dim)
