"""A tokenizer for models that were never trained: one token for each byte, a few markers, and names for the rest.

Whatever a random model says can be shown, and whatever a user says can be encoded. Knows no model.
"""

from pathlib import Path
from typing import Final

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

NUM_BYTES: Final = 256
_MARKERS: Final = ("<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
LEAST_VOCAB: Final = NUM_BYTES + len(_MARKERS)
# As a checkpoint's configuration names them.
SPECIAL_IDS: Final = {"bos_token_id": NUM_BYTES, "eos_token_id": NUM_BYTES + 1, "pad_token_id": NUM_BYTES + 1}
_CHAT_TEMPLATE: Final = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def write_toy_tokenizer(directory: Path, *, vocab: int, context: int) -> None:
    """Write tokenizer.json, its configuration and a chat template. Tokens beyond bytes and markers read ` t261`
    and so on; no text is ever encoded as those."""
    assert vocab >= LEAST_VOCAB, vocab
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *_MARKERS]
    names += [f"Ġt{token_id}" for token_id in range(LEAST_VOCAB, vocab)]
    tokenizer = Tokenizer(models.BPE(vocab={name: token_id for token_id, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(marker, normalized=False) for marker in _MARKERS])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_MARKERS[0],
        eos_token=_MARKERS[1],
        pad_token=_MARKERS[1],
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = _CHAT_TEMPLATE
    wrapped.save_pretrained(directory)
