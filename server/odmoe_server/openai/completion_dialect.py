"""How a text completion is written: one JSON body, or chunks. Knows OpenAI's shapes only."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from odmoe_server.answering import Answer
from odmoe_server.assembly import Piece
from odmoe_server.engine_api import Token
from odmoe_server.generation import Ending
from odmoe_server.openai.logprobs import completion_logprobs
from odmoe_server.openai.render import (
    Extras,
    Letterhead,
    error_event,
    event,
    finish,
    substitutions,
    to_json,
    usage,
)
from odmoe_server.text import TextCodec


class CompletionDialect:
    """One answer. See `answering.Dialect`. `echoes`: what stands before each choice's text, nothing without echo."""

    def __init__(
        self, head: Letterhead, *, extras: Extras, text: TextCodec, with_logprobs: bool, echoes: Sequence[str]
    ) -> None:
        self._head = head.fields("text_completion")
        self._extras = extras
        self._text = text
        self._with_logprobs = with_logprobs
        self._echoes = echoes
        self._endings: dict[int, Ending] = {}
        self._num_tokens: dict[int, int] = {}  # of each choice that has begun
        self._offsets = [len(echo) for echo in echoes]

    def events(self, index: int, part: Piece | Ending) -> Iterator[bytes]:
        """See `answering.Dialect`."""
        if index not in self._num_tokens:
            self._num_tokens[index] = 0
            if self._echoes[index]:
                yield self._event(self._choice(index, self._echoes[index], ()))
        if isinstance(part, Piece):
            self._num_tokens[index] = part.num_tokens
            if part.text or part.tokens:
                yield self._event(self._choice(index, part.text, part.tokens))
                self._offsets[index] += len(part.text)
            return
        self._num_tokens[index] = part.completion_tokens
        self._endings[index] = part
        yield self._event({**self._choice(index, "", ()), **finish(part)}, **substitutions([part]))

    def closing(self) -> Iterable[bytes]:
        """See `answering.Dialect`."""
        endings = [self._endings[index] for index in sorted(self._endings)]
        return self._extras.closing(self._head, endings)

    def error_event(self, error: Exception) -> bytes:
        """See `answering.Dialect`."""
        return error_event(error)

    def body(self, answers: Sequence[Answer]) -> bytes:
        """See `answering.Dialect`."""
        endings = [answer.ending for answer in answers]
        choices = [
            {**self._choice(index, self._echoes[index] + answer.text, answer.tokens), **finish(answer.ending)}
            for index, answer in enumerate(answers)
        ]
        usage_of_all = self._extras.total_usage(endings)
        return to_json({**self._head, "choices": choices, "usage": usage_of_all, **self._extras.reports(endings)})

    def _choice(self, index: int, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        found = completion_logprobs(tokens, self._text, offset=self._offsets[index]) if self._with_logprobs else None
        return {"index": index, "text": text, "logprobs": found, "finish_reason": None}

    def _event(self, choice: dict[str, Any], **besides: Any) -> bytes:
        chunk = {**self._head, "choices": [choice], **besides}
        if self._extras.usage_always:
            so_far = sum(self._num_tokens.values())
            chunk["usage"] = usage(prompt_tokens=self._extras.prompt_tokens, completion_tokens=so_far)
        return event(chunk)
