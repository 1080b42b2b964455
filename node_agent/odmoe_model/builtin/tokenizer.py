"""Writes the parent's tokenizer as ordinary transformers files.

Knows the byte-level BPE of SmolLM2 (digits are split singly, which the GGUF file states only by the name `smollm`) and
takes vocabulary, merges and chat template from the GGUF metadata. Does not know the weights.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from odmoe_model.builtin.parent import DenseParent

_CONTROL_TOKEN = 3  # llama.cpp's token type for markers such as <|im_end|>


def write_tokenizer(parent: DenseParent, directory: Path) -> None:
    """Write tokenizer.json, its configuration and the chat template into `directory`."""
    tokens: list[str] = parent.field("tokenizer.ggml.tokens")
    bos, eos, unknown = (tokens[parent.field(f"tokenizer.ggml.{kind}_token_id")] for kind in ("bos", "eos", "unknown"))
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=_byte_level_bpe(parent, tokens),
        bos_token=bos,
        eos_token=eos,
        unk_token=unknown,
        pad_token=eos,
        model_max_length=parent.shape.context_tokens,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = parent.field("tokenizer.chat_template")
    wrapped.save_pretrained(directory)


def _byte_level_bpe(parent: DenseParent, tokens: list[str]) -> Tokenizer:
    merges = [tuple(merge.split(" ")) for merge in parent.field("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = parent.field("tokenizer.ggml.token_type")
    markers = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(marker, normalized=False) for marker in markers])
    return tokenizer
