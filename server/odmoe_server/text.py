"""From messages to token ids and from token ids back to text. Knows the tokenizer; nothing of HTTP or the engine.

Rendering and tokenising take milliseconds to seconds for long prompts, so they run in a thread; one at a time, since
transformers' tokenizers keep settings in themselves while they encode. Detokenising one token takes microseconds and
has a tokenizer of its own, so that it can go on beside.
"""

from collections.abc import Sequence
from typing import Any

import anyio
import anyio.to_thread
from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A character has at most four bytes, so at most four tokens; what stays broken for longer is no character.
MAX_HELD_TOKENS = 8


class TextError(ValueError):
    """The conversation cannot be rendered for this model; the message says why."""


class Detokeniser:
    """Text of one answer, token by token; never shows half a character."""

    def __init__(self, tokenizer: Tokenizer, *, special_ids: frozenset[int] = frozenset()) -> None:
        self._tokenizer = tokenizer
        self._special_ids = special_ids
        # Decoding depends on the neighbours on the left, so the tokens shown last stay in as context.
        self._ids: list[int] = []
        self._num_context = 0

    def push(self, token_id: int) -> str:
        """Text that is certain now that `token_id` has come."""
        if token_id in self._special_ids:
            return ""
        self._ids.append(token_id)
        text = self._pending()
        incomplete = not text or text.endswith(REPLACEMENT)
        if incomplete and len(self._ids) - self._num_context < MAX_HELD_TOKENS:
            return ""
        self._ids = self._ids[self._num_context :]
        self._num_context = len(self._ids)
        return text

    def flush(self) -> str:
        """What is left at the end; a character that was never completed becomes U+FFFD."""
        text = self._pending()
        self._num_context = len(self._ids)
        return text

    def _pending(self) -> str:
        shown = self._decode(self._ids[: self._num_context])
        return self._decode(self._ids)[len(shown) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False) if ids else ""


class TextCodec:
    """One model's chat template and tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise TextError(f"{type(tokenizer).__name__} has no tokenizer.json; only fast tokenizers are supported")
        self._tokenizer = tokenizer
        self._decoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        added = self._decoder.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._one_at_a_time = anyio.CapacityLimiter(1)

    @property
    def can_chat(self) -> bool:
        """Whether the model comes with a chat template."""
        return self._tokenizer.chat_template is not None

    async def prompt_ids(self, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
        """Token ids of the conversation, up to where the answer begins. Raises `TextError`."""
        return await anyio.to_thread.run_sync(self._prompt_ids, messages, limiter=self._one_at_a_time)

    def detokeniser(self) -> Detokeniser:
        """For one answer."""
        return Detokeniser(self._decoder, special_ids=self._special_ids)

    def _prompt_ids(self, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
        if not self.can_chat:
            raise TextError("This model has no chat template, so it cannot answer a conversation.")
        try:
            ids: Any = self._tokenizer.apply_chat_template(
                [{**message, "role": _role(message["role"])} for message in messages],
                add_generation_prompt=True,
                return_dict=False,
                # Control tokens that a user writes into a message are text, not control tokens.
                sanitize_control_tokens=True,
            )
        except (TemplateError, ValueError) as error:
            raise TextError(f"The model's chat template refuses these messages: {error}") from error
        return tuple(ids)


def _role(role: str) -> str:
    # The newer name for the same thing; templates know the older one.
    return "system" if role == "developer" else role
