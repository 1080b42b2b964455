"""Reads the dense parent, SmolLM2-135M-Instruct, out of its GGUF file.

Knows GGUF's names and llama.cpp's order of rotary dimensions, and gives back tensors as transformers names and orders
them. Does not know that anybody will make experts of them. Tensors are dequantised one at a time, so memory holds
one of them and not the model.

Dimensions: H hidden, F inner width of the feed-forward network, O output, I input.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

_BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_TOP_NAMES = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}


@dataclass(frozen=True)
class ParentShape:
    """Sizes of the dense parent, as its file states them."""

    num_layers: int
    hidden: int
    ffn: int
    num_heads: int
    num_kv_heads: int
    vocabulary: int
    context_tokens: int
    rope_base: float
    norm_epsilon: float


class DenseParent:
    """The parent's tensors by their transformers names, in fp32, dequantised when asked for."""

    def __init__(self, gguf_path: Path) -> None:
        self._reader = gguf.GGUFReader(gguf_path)
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.shape = ParentShape(
            num_layers=int(self.field("llama.block_count")),
            hidden=int(self.field("llama.embedding_length")),
            ffn=int(self.field("llama.feed_forward_length")),
            num_heads=int(self.field("llama.attention.head_count")),
            num_kv_heads=int(self.field("llama.attention.head_count_kv")),
            vocabulary=int(self.field("llama.vocab_size")),
            context_tokens=int(self.field("llama.context_length")),
            rope_base=float(self.field("llama.rope.freq_base")),
            # Stored as fp32, where 1e-5 reads 9.99999975e-06: say the decimal that was meant.
            norm_epsilon=float(f"{self.field('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        )

    def field(self, key: str) -> Any:
        """A metadata value of the GGUF file (number, text or list)."""
        return self._reader.fields[key].contents()

    def names(self) -> list[str]:
        """All tensor names, embedding first, layers in order, final norm last."""
        embedding, norm = _TOP_NAMES
        layers = [f"model.layers.{n}.{block}.weight" for n in range(self.shape.num_layers) for block in _BLOCK_NAMES]
        return [embedding, *layers, norm]

    def tensor(self, name: str) -> Tensor:
        """One tensor in fp32, in transformers' layout."""
        stored = self._tensors[_gguf_name(name)]
        # One multiplication and one addition per value in numpy: no BLAS, hence the same bits on every machine.
        weight_OI = np.array(gguf.quants.dequantize(stored.data, stored.tensor_type), dtype=np.float32)
        if name.endswith("q_proj.weight"):
            weight_OI = _pairs_to_halves(weight_OI, num_heads=self.shape.num_heads)
        elif name.endswith("k_proj.weight"):
            weight_OI = _pairs_to_halves(weight_OI, num_heads=self.shape.num_kv_heads)
        return torch.from_numpy(np.ascontiguousarray(weight_OI))


def _gguf_name(name: str) -> str:
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    _, _, layer, block = name.removesuffix(".weight").split(".", maxsplit=3)
    return f"blk.{layer}.{_BLOCK_NAMES[block]}.weight"


def _pairs_to_halves(weight_OI: np.ndarray, *, num_heads: int) -> np.ndarray:
    """llama.cpp rotates neighbouring dimensions, transformers the two halves of a head: reorder the rows."""
    rows, columns = weight_OI.shape
    pairs = weight_OI.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)
