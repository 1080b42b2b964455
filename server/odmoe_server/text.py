"""From messages to token ids and from token ids back to text. Knows the tokenizer; nothing of HTTP or the engine.

Rendering and tokenising take milliseconds to seconds for long prompts, so they run in a thread; one at a time, since
transformers' tokenizers keep settings in themselves while they encode. Detokenising one token takes microseconds and
has a tokenizer of its own, so that it can go on beside.
"""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Final, TypeVar

import anyio
import anyio.to_thread
from jinja2 import TemplateError
from jinja2.defaults import DEFAULT_NAMESPACE
from tokenizers import Tokenizer, decoders
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.utils.chat_template_utils import _get_template_variables

T = TypeVar("T")

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A character has at most four bytes, so at most four tokens; what stays broken for longer is no character.
MAX_HELD_TOKENS = 8
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE_MARK = "\u2581"  # SentencePiece's
_NUM_TOKENS_KEPT = 65536
# What transformers gives every template, besides Jinja's own and the tokenizer's control tokens.
_GIVEN: Final = frozenset({"messages", "raise_exception", "strftime_now", *DEFAULT_NAMESPACE})


class TextError(ValueError):
    """The conversation cannot be rendered for this model; the message says why, `variable` of which it is."""

    def __init__(self, message: str, *, variable: str | None = None) -> None:
        super().__init__(message)
        self.variable = variable


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """How a conversation is written. `begins_answer`: up to where an answer begins; else it ends with the last message,
    which is left open if an answer `goes_on` with it. `variables`: what else the template may look at."""

    begins_answer: bool = True
    goes_on: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)


class Detokeniser:
    """Text of one answer, token by token; never shows half a character."""

    def __init__(self, tokenizer: Tokenizer, *, special_ids: frozenset[int] = frozenset()) -> None:
        self._tokenizer = tokenizer
        self._special_ids = special_ids
        # Decoding depends on the neighbours on the left, so the tokens shown last stay in as context.
        self._ids: list[int] = []
        self._num_context = 0
        self._num_context_chars = 0

    def hides(self, token_id: int) -> bool:
        """Whether this token is never shown."""
        return token_id in self._special_ids

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
        self._keep_all()
        return text

    def flush(self) -> str:
        """What is left at the end; a character that was never completed becomes U+FFFD."""
        text = self._pending()
        self._keep_all()
        return text

    def _keep_all(self) -> None:
        self._num_context = len(self._ids)
        self._num_context_chars = len(self._decode(self._ids))

    def _pending(self) -> str:
        return self._decode(self._ids)[self._num_context_chars :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False) if ids else ""


class TextCodec:
    """One model's chat template and tokenizer. `num_embeddings`: how many tokens the model knows, if that is fewer
    than the tokenizer has. `end_ids`: the tokens that end an answer; else the tokenizer's own."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        num_embeddings: int | None = None,
        end_ids: Sequence[int] | None = None,
    ) -> None:
        if not tokenizer.is_fast:
            raise TextError(f"{type(tokenizer).__name__} has no tokenizer.json; only fast tokenizers are supported")
        self._tokenizer = tokenizer
        self._decoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        own_end = tokenizer.eos_token_id
        self.end_ids = tuple(end_ids if end_ids is not None else () if own_end is None else (own_end,))
        self.vocab_size = min(len(tokenizer), num_embeddings or len(tokenizer))
        added = self._decoder.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._added = {token_id: token.content for token_id, token in added.items()}
        is_bytes = _is_byte_level(self._decoder)
        self._byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()} if is_bytes else {}
        self._one_at_a_time = anyio.CapacityLimiter(1)
        self._cached_bytes = lru_cache(_NUM_TOKENS_KEPT)(self._token_bytes)

    @property
    def can_chat(self) -> bool:
        """Whether the model comes with a chat template."""
        return self._tokenizer.chat_template is not None

    @property
    def backend(self) -> Tokenizer:
        """The tokenizer itself; not to be changed."""
        return self._decoder

    @property
    def control_tokens(self) -> frozenset[str]:
        """Those that are never shown."""
        return frozenset(self._added[token_id] for token_id in self._special_ids)

    async def with_template(self, work: Callable[[Callable[..., str]], T]) -> T:
        """What `work` makes of a function that renders (messages, tools, add_generation_prompt) as text."""
        return await self._alone(lambda: work(self._render))

    async def prompt_ids(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        rendering: Rendering | None = None,
    ) -> tuple[int, ...]:
        """Token ids of the conversation, up to where the answer begins. Raises `TextError`."""
        return await self._alone(lambda: self._prompt_ids(messages, tools, rendering or Rendering()))

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of a text; control tokens in it are control tokens."""
        return await self._alone(lambda: tuple(self._tokenizer.encode(text, add_special_tokens=add_special_tokens)))

    async def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, control tokens included."""
        return await self._alone(lambda: str(self._decoder.decode(list(ids), skip_special_tokens=False)))

    def detokeniser(self, *, skip_special_tokens: bool = True) -> Detokeniser:
        """For one answer."""
        return Detokeniser(self._decoder, special_ids=self._special_ids if skip_special_tokens else frozenset())

    def token_text(self, token_id: int) -> str:
        """One token by itself; a part of a character becomes U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for; those of all tokens of an answer are the bytes of its text."""
        return self._cached_bytes(token_id)

    def _token_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._decoder.id_to_token(token_id) or ""  # models may have more tokens than their tokenizer
        if self._byte_of:
            return bytes(self._byte_of[letter] for letter in token if letter in self._byte_of)
        if one_byte := _BYTE_TOKEN.fullmatch(token):
            return bytes.fromhex(one_byte[1])
        return token.replace(_SPACE_MARK, " ").encode()

    def _render(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], add_generation_prompt: bool
    ) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                list(messages), tools=list(tools), add_generation_prompt=add_generation_prompt, tokenize=False
            )
        )

    async def _alone(self, work: Callable[[], T]) -> T:
        return await anyio.to_thread.run_sync(work, limiter=self._one_at_a_time)

    def _prompt_ids(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None, rendering: Rendering
    ) -> tuple[int, ...]:
        if not self.can_chat:
            raise TextError("This model has no chat template, so it cannot answer a conversation.")
        try:
            ids: Any = self._tokenizer.apply_chat_template(
                [{**message, "role": _role(message["role"])} for message in messages],
                tools=tools,
                add_generation_prompt=rendering.begins_answer,
                continue_final_message=rendering.goes_on,
                return_dict=False,
                # Control tokens that a user writes into a message are text, not control tokens.
                sanitize_control_tokens=True,
                **self._known(rendering.variables),
            )
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            if isinstance(error, TextError):
                raise
            # Transformers appends the whole conversation.
            reason = str(error).partition("Final message to continue")[0]
            raise TextError(f"The model's chat template refuses these messages: {reason}") from error
        return tuple(ids)

    def _known(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Those the template looks at. Raises TextError for others, unless they say no to what it does not know."""
        for name, value in variables.items():
            if name in self._own_names:
                raise TextError(f"'{name}' is not for clients to set.", variable=name)
            if name not in self._variables and value is not None and value is not False:
                known = ", ".join(f"'{known}'" for known in sorted(self._variables)) or "none"
                raise TextError(f"This model's chat template does not use '{name}'; it uses {known}.", variable=name)
        return {name: value for name, value in variables.items() if name in self._variables}

    @cached_property
    def _own_names(self) -> frozenset[str]:
        """Names that say something else to transformers, or are in every template."""
        ours = inspect.signature(self._tokenizer.apply_chat_template).parameters
        return _GIVEN.union(ours, self._tokenizer.special_tokens_map)

    @cached_property
    def _variables(self) -> frozenset[str]:
        """What clients may set: names the template reads and does not set itself."""
        return frozenset(_get_template_variables(self._tokenizer.get_chat_template())) - self._own_names


def _role(role: str) -> str:
    # The newer name for the same thing; templates know the older one.
    return "system" if role == "developer" else role


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    """Whether each letter of a token stands for a byte."""
    decoder = tokenizer.decoder
    return isinstance(decoder, decoders.ByteLevel) or "ByteLevel" in str(decoder)
