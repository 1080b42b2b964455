"""Log probabilities as chat and text completions write them. Knows tokens' texts; nothing of streams."""

from collections.abc import Callable, Sequence
from typing import Any, Final

from odmoe_server.engine_api import Token
from odmoe_server.text import TextCodec

_LEAST: Final = -9999.0  # JSON has no -inf


def chat_logprobs(tokens: Sequence[Token], text: TextCodec) -> dict[str, Any]:
    """A choice's `logprobs` of a chat completion."""
    return {"content": [_scored(token, text) for token in tokens], "refusal": None}


def _scored(token: Token, text: TextCodec) -> dict[str, Any]:
    top = [_entry(token_id, logprob, text) for token_id, logprob in token.top]
    return {**_entry(token.token_id, token.logprob, text), "top_logprobs": top}


def _entry(token_id: int, logprob: float | None, text: TextCodec) -> dict[str, Any]:
    return {"token": text.token_text(token_id), "logprob": finite(logprob), "bytes": list(text.token_bytes(token_id))}


def completion_logprobs(
    tokens: Sequence[Token], text: TextCodec, *, offset: int, hides: Callable[[int], bool]
) -> dict[str, Any]:
    """A choice's `logprobs` of a text completion, whose tokens begin `offset` characters into its text. The chosen
    token is among the likeliest, as OpenAI has it. Tokens that `hides` have no length in the text."""
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += 0 if hides(token.token_id) else len(text.token_text(token.token_id))
    return scores_at(tokens, text, offsets)


def joined(*parts: dict[str, Any]) -> dict[str, Any]:
    """Of texts that follow one another."""
    return {name: [entry for part in parts for entry in part[name]] for name in parts[0]}


def scores_at(tokens: Sequence[Token], text: TextCodec, offsets: Sequence[int]) -> dict[str, Any]:
    """The same with the places given; null for a prompt's first token, which follows none."""
    return {
        "tokens": [text.token_text(token.token_id) for token in tokens],
        "token_logprobs": [None if token.logprob is None else finite(token.logprob) for token in tokens],
        "top_logprobs": [None if token.logprob is None else _by_name(token, text) for token in tokens],
        "text_offset": list(offsets),
    }


def _by_name(token: Token, text: TextCodec) -> dict[str, float]:
    found: dict[str, float] = {}
    for token_id, logprob in (*token.top, (token.token_id, token.logprob)):
        found.setdefault(text.token_text(token_id), finite(logprob))
    return found


def finite(logprob: float | None) -> float:
    """As JSON can have it."""
    return _LEAST if logprob is None else max(logprob, _LEAST)
