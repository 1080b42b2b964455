"""Which tokens an answer may have, as vLLM's clients say it, to a constraint of the engine. Knows the text codec."""

from collections.abc import Sequence

from odmoe_server.engine_api import Constraint
from odmoe_server.openai.errors import InvalidRequest
from odmoe_server.openai.generating import Generating
from odmoe_server.text import TextCodec
from odmoe_server.token_bounds import NotWords, OnlyTokens


async def token_bound(asked: Generating, *, text: TextCodec) -> Constraint | None:
    """Of the fields `allowed_token_ids` and `bad_words`, of which `Generating.check` lets one through. Raises
    InvalidRequest."""
    if asked.allowed_token_ids is not None:
        return OnlyTokens(_allowed(asked, asked.allowed_token_ids, text=text))
    if asked.bad_words:
        return NotWords(tuple([ids for word in asked.bad_words for ids in await _spellings(word, text=text)]))
    return None


def _allowed(asked: Generating, token_ids: Sequence[int], *, text: TextCodec) -> tuple[int, ...]:
    wrong = [token_id for token_id in token_ids if not 0 <= token_id < text.vocab_size]
    if wrong:
        raise InvalidRequest(f"This model has no token {wrong[0]}.", param="allowed_token_ids")
    end_ids = {*(asked.stop_token_ids or ()), *(() if asked.ignore_eos else text.end_ids)}
    if asked.min_tokens and end_ids.issuperset(token_ids):
        text_ = "All of 'allowed_token_ids' end the answer, which 'min_tokens' forbids."
        raise InvalidRequest(text_, param="allowed_token_ids")
    return tuple(dict.fromkeys(token_ids))


async def _spellings(word: str, *, text: TextCodec) -> list[tuple[int, ...]]:
    """A word's tokens at the beginning of a text and behind a space, as vLLM has them: the latter only where it is one
    token instead of another."""
    plain = await text.encode(word, add_special_tokens=False)
    spaced = await text.encode(f" {word.lstrip()}", add_special_tokens=False)
    differs = len(spaced) == len(plain) and spaced[:1] != plain[:1]
    return [ids for ids in (plain, spaced if differs else ()) if ids]
