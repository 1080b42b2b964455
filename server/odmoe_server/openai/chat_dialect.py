"""How a chat completion is written: one JSON body, or chunks. Knows OpenAI's shapes only."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from odmoe_server.answering import Answer
from odmoe_server.assembly import Piece
from odmoe_server.generation import Ending
from odmoe_server.openai.logprobs import chat_logprobs
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
from odmoe_server.openai.tools_chat import ChatCalls
from odmoe_server.openai.tools_format import ToolFormat
from odmoe_server.text import TextCodec


class ChatDialect:
    """One answer. See `answering.Dialect`. A stream is the role once for each choice, text, one finish reason for
    each, usage if asked, [DONE]."""

    def __init__(
        self,
        head: Letterhead,
        *,
        extras: Extras,
        text: TextCodec,
        with_logprobs: bool,
        reading: Reading,
        form: ToolFormat | None = None,
    ) -> None:
        self._chunk = head.fields("chat.completion.chunk")
        self._head = head
        self._extras = extras
        self._text = text
        self._with_logprobs = with_logprobs
        self._reading = reading
        self._ids: dict[int, list[int]] = {}  # of each choice, that no chunk has told yet
        self._calls = None if form is None else ChatCalls(form, answer_id=head.id)
        self._endings: dict[int, Ending] = {}
        self._num_tokens: dict[int, int] = {}  # of each choice that has begun

    def events(self, index: int, part: Piece | Ending) -> Iterator[bytes]:
        """See `answering.Dialect`."""
        if index not in self._num_tokens:
            self._num_tokens[index] = 0
            yield self._choice(index, {"role": "assistant", "content": ""}, **self._reading.of_prompt(index, ()))
        self._ids.setdefault(index, []).extend(part.ids)
        if isinstance(part, Piece):
            self._num_tokens[index] = part.num_tokens
            if self._calls is not None:
                yield from (self._choice(index, delta) for delta in self._calls.deltas(index, part))
            elif part.text or part.tokens or part.ids:
                yield self._choice(index, {"content": part.text}, piece=part)
            return
        self._num_tokens[index] = part.completion_tokens
        self._endings[index] = part
        if self._calls is not None:
            yield from (self._choice(index, delta) for delta in self._calls.deltas(index, part))
        yield self._choice(index, {}, ending=part, **routed_experts(part))

    def closing(self) -> Iterable[bytes]:
        """See `answering.Dialect`."""
        endings = [self._endings[index] for index in sorted(self._endings)]
        return self._extras.closing(self._chunk, endings)

    def error_event(self, error: Exception) -> bytes:
        """See `answering.Dialect`."""
        return error_event(error)

    def body(self, answers: Sequence[Answer]) -> bytes:
        """See `answering.Dialect`."""
        endings = [answer.ending for answer in answers]
        return to_json(
            {
                **self._head.fields("chat.completion"),
                "choices": [self._whole(index, answer) for index, answer in enumerate(answers)],
                **self._reading.of_prompt(0, answers[0].prompt),
                "usage": self._extras.total_usage(endings),
                **self._extras.reports(endings),
            }
        )

    def _whole(self, index: int, answer: Answer) -> dict[str, Any]:
        said = {"content": answer.text} if self._calls is None else self._calls.message(index, answer.text)
        return {
            "index": index,
            "message": {"role": "assistant", "refusal": None, **said},
            "logprobs": chat_logprobs(answer.tokens, self._text) if self._with_logprobs else None,
            **self._finish(index, answer.ending),
            **self._reading.of_answer(answer),
        }

    def _finish(self, index: int, ending: Ending) -> dict[str, Any]:
        called = self._calls is not None and self._calls.ends_answer(index, ending)
        return {"finish_reason": "tool_calls"} if called else finish(ending)

    def _choice(
        self,
        index: int,
        delta: dict[str, Any],
        *,
        piece: Piece | None = None,
        ending: Ending | None = None,
        prompt_token_ids: list[int] | None = None,
        **besides: Any,
    ) -> bytes:
        has_logprobs = piece is not None and self._with_logprobs
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": chat_logprobs(piece.tokens, self._text) if piece is not None and has_logprobs else None,
            **({"finish_reason": None} if ending is None else self._finish(index, ending)),
            **self._reading.of_tokens(self._ids.pop(index, ())),
            **besides,
        }
        chunk = {**self._chunk, "choices": [choice], **({} if ending is None else substitutions([ending]))}
        if prompt_token_ids is not None:
            chunk["prompt_token_ids"] = prompt_token_ids
        if self._extras.usage_always:
            so_far = sum(self._num_tokens.values())
            chunk["usage"] = usage(prompt_tokens=self._extras.prompt_tokens, completion_tokens=so_far)
        return event(chunk)
