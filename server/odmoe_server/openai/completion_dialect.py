"""How a text completion is written: one JSON body, or chunks. Knows OpenAI's shapes only."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from odmoe_server.answering import Answer
from odmoe_server.assembly import Piece
from odmoe_server.engine_api import Token
from odmoe_server.generation import Ending
from odmoe_server.openai.logprobs import completion_logprobs, joined, scores_at
from odmoe_server.openai.reading import Reading, routed_experts
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


@dataclass(frozen=True, kw_only=True)
class Echo:
    """A prompt as its choice shows it; `offsets`: where its tokens begin, where their log probabilities are shown."""

    text: str = ""
    offsets: Sequence[int] = ()


class CompletionDialect:
    """One answer. See `answering.Dialect`. `echoes`: what stands before each choice's text, nothing without echo.
    `num_logprobs`: alternatives of each token, None for no log probabilities at all; `hides`: which tokens are not in
    the text."""

    def __init__(
        self,
        head: Letterhead,
        *,
        extras: Extras,
        text: TextCodec,
        num_logprobs: int | None,
        echoes: Sequence[Echo],
        reading: Reading,
        hides: Callable[[int], bool],
    ) -> None:
        self._head = head.fields("text_completion")
        self._extras = extras
        self._text = text
        self._num_logprobs = num_logprobs
        self._reading = reading
        self._hides = hides
        self._echoes = echoes
        self._endings: dict[int, Ending] = {}
        self._num_tokens: dict[int, int] = {}  # of each choice that has begun
        self._offsets = [len(echo.text) for echo in echoes]

    def events(self, index: int, part: Piece | Ending) -> Iterator[bytes]:
        """See `answering.Dialect`."""
        if index not in self._num_tokens:
            self._num_tokens[index] = 0
            prompt = part.prompt if isinstance(part, Piece) else ()
            told = self._reading.of_prompt(index, prompt)
            if told or self._echoes[index].text:
                yield self._event({**self._echo(index, prompt), **told})
        if isinstance(part, Piece):
            self._num_tokens[index] = part.num_tokens
            if part.text or part.tokens or part.ids:
                yield self._event({**self._choice(index, part.text, part.tokens), **self._reading.of_tokens(part.ids)})
                self._offsets[index] += len(part.text)
            return
        self._num_tokens[index] = part.completion_tokens
        self._endings[index] = part
        told = {**self._reading.of_tokens(part.ids), **routed_experts(part)}
        yield self._event({**self._choice(index, "", ()), **finish(part), **told}, **substitutions([part]))

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
        choices = [self._whole(index, answer) for index, answer in enumerate(answers)]
        usage_of_all = self._extras.total_usage(endings)
        return to_json({**self._head, "choices": choices, "usage": usage_of_all, **self._extras.reports(endings)})

    def _whole(self, index: int, answer: Answer) -> dict[str, Any]:
        echo, choice = self._echo(index, answer.prompt), self._choice(index, answer.text, answer.tokens)
        return {
            **choice,
            "text": echo["text"] + choice["text"],
            "logprobs": None if self._num_logprobs is None else joined(echo["logprobs"], choice["logprobs"]),
            **finish(answer.ending),
            **self._reading.of_prompt(index, answer.prompt),
            **self._reading.of_answer(answer),
        }

    def _echo(self, index: int, prompt: Sequence[Token]) -> dict[str, Any]:
        """What stands before a choice's text; `prompt` as the engine has read it, if that was asked for."""
        echo, found = self._echoes[index], None
        if self._num_logprobs is not None:
            tokens = [replace(token, top=token.top[: self._num_logprobs]) for token in prompt[: len(echo.offsets)]]
            found = scores_at(tokens, self._text, echo.offsets)
        return {"index": index, "text": echo.text, "logprobs": found, "finish_reason": None}

    def _choice(self, index: int, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        found = None
        if self._num_logprobs is not None:
            found = completion_logprobs(tokens, self._text, offset=self._offsets[index], hides=self._hides)
        return {"index": index, "text": text, "logprobs": found, "finish_reason": None}

    def _event(self, choice: dict[str, Any], **besides: Any) -> bytes:
        chunk = {**self._head, "choices": [choice], **besides}
        if self._extras.usage_always:
            so_far = sum(self._num_tokens.values())
            chunk["usage"] = usage(prompt_tokens=self._extras.prompt_tokens, completion_tokens=so_far)
        return event(chunk)
