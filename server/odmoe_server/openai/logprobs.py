"""Log probabilities as chat and text completions write them. Knows tokens' texts; nothing of streams."""

from collections.abc import Sequence
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
    return {"token": text.token_text(token_id), "logprob": _finite(logprob), "bytes": list(text.token_bytes(token_id))}


def completion_logprobs(tokens: Sequence[Token], text: TextCodec, *, offset: int) -> dict[str, Any]:
    """A choice's `logprobs` of a text completion, whose tokens begin `offset` characters into its text. The chosen
    token is among the likeliest, as OpenAI has it."""
    names = [text.token_text(token.token_id) for token in tokens]
    offsets = []
    for name in names:
        offsets.append(offset)
        offset += len(name)
    return {
        "tokens": names,
        "token_logprobs": [_finite(token.logprob) for token in tokens],
        "top_logprobs": [_by_name(token, text) for token in tokens],
        "text_offset": offsets,
    }


def _by_name(token: Token, text: TextCodec) -> dict[str, float]:
    found: dict[str, float] = {}
    for token_id, logprob in (*token.top, (token.token_id, token.logprob)):
        found.setdefault(text.token_text(token_id), _finite(logprob))
    return found


def _finite(logprob: float | None) -> float:
    return _LEAST if logprob is None else max(logprob, _LEAST)
