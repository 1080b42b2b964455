"""Prompts of a given length for any tokenizer. Pure, but for the tokenizer that comes as an argument."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

TEXT: Final = (
    "A harbour town in autumn is quiet before dawn; then the boats come in, the market opens, and somebody has to "
    "count the boxes. She wrote the numbers down twice, once for the owner and once for herself, because numbers "
    "that nobody checks tend to wander. By noon the fog had lifted from the hills, and the ferry was late again. "
)


@dataclass(frozen=True)
class Prompt:
    """A user's message and what the chat template makes of it."""

    content: str
    token_ids: list[int]


class Prompts:
    """Makes prompts with a tokenizer of transformers."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def make(self, num_tokens: int, *, number: int) -> Prompt:
        """The `number`th prompt of at least so many tokens, of no more than it takes."""
        words = TEXT.split()
        turned = " ".join(words[number % len(words) :] + words)
        for length in range(1, 100 * num_tokens):
            prompt = self._of((turned * (1 + length // len(turned)))[:length])
            if len(prompt.token_ids) >= num_tokens:
                return prompt
        raise ValueError(f"this model's tokenizer makes no {num_tokens} tokens of a text")

    def text(self, tokens: Sequence[int]) -> str:
        """What a server would answer with these tokens."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def _of(self, content: str) -> Prompt:
        messages = [{"role": "user", "content": content}]
        ids = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        return Prompt(content, list(ids))
