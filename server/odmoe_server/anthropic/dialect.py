"""How an answer is written for Anthropic's clients: one body, or events. Knows their shapes only; waits for nothing."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from odmoe_server.answering import Answer
from odmoe_server.anthropic.errors import anthropic_body
from odmoe_server.assembly import Piece
from odmoe_server.generation import Ending
from odmoe_server.openai.errors import problem_of
from odmoe_server.openai.render import LINE_BREAKS, substitutions, to_json
from odmoe_server.openai.tools_format import ToolFormat
from odmoe_server.openai.tools_parse import CallArguments, CallBegun, CallEvent, CallParser, Said, read_calls


@dataclass(frozen=True, kw_only=True)
class Heading:
    """What is known of an answer before it begins. `max_tokens` is what the client asked for, `form` how calls are
    written in it, if there may be any."""

    id: str
    model: str
    request_id: str
    input_tokens: int
    max_tokens: int
    form: ToolFormat | None

    def tool_id(self, index: int) -> str:
        """The id of a call."""
        return f"toolu_{self.id.removeprefix('msg_')}{index:02d}"


class MessagesDialect:
    """One answer. See `answering.Dialect`. In a stream each block is begun, filled and ended before the next."""

    def __init__(self, head: Heading) -> None:
        self._head = head
        self._parser = None if head.form is None else CallParser(head.form)
        self._index = -1
        self._open: str | None = None
        self._begun = False

    def events(self, index: int, part: Piece | Ending) -> Iterator[bytes]:
        """See `answering.Dialect`."""
        if not self._begun:
            self._begun = True
            usage = {"input_tokens": self._head.input_tokens, "output_tokens": 0}
            yield event("message_start", message=_message(self._head, content=[], usage=usage))
        if isinstance(part, Piece):
            for said in self._parser.push(part.text) if self._parser else [Said(part.text)] if part.text else []:
                yield from self._write(said)
            return
        for said in self._parser.flush() if self._parser else []:
            yield from self._write(said)
        yield from self._end_block()
        num_calls = self._parser.num_calls if self._parser else 0
        yield event("message_delta", delta=_stop(self._head, part, num_calls=num_calls), usage=_usage(part))

    def closing(self) -> Iterable[bytes]:
        """See `answering.Dialect`."""
        return (event("message_stop"),)

    def error_event(self, error: Exception) -> bytes:
        """See `answering.Dialect`."""
        return _event("error", anthropic_body(problem_of(error), request_id=self._head.request_id))

    def body(self, answers: Sequence[Answer]) -> bytes:
        """See `answering.Dialect`."""
        (answer,) = answers
        text, calls = read_calls(self._parser, answer.text) if self._parser else (answer.text, [])
        content: list[dict[str, Any]] = [{"type": "text", "text": text}] if text else []
        for index, call in enumerate(calls):
            content.append(_tool_use(self._head.tool_id(index), call.name, input_=_object(call.arguments)))
        message = _message(self._head, content=content, usage=_usage(answer.ending))
        return to_json({**message, **_stop(self._head, answer.ending, num_calls=len(calls))})

    def _write(self, said: CallEvent) -> Iterator[bytes]:
        match said:
            case Said(text):
                if self._open != "text":
                    yield from self._begin_block("text", {"type": "text", "text": ""})
                yield self._delta({"type": "text_delta", "text": text})
            case CallBegun(index, name):
                yield from self._begin_block("tool", _tool_use(self._head.tool_id(index), name, input_={}))
            case CallArguments(_, piece):
                yield self._delta({"type": "input_json_delta", "partial_json": piece})

    def _begin_block(self, kind: str, block: dict[str, Any]) -> Iterator[bytes]:
        yield from self._end_block()
        self._index += 1
        self._open = kind
        yield event("content_block_start", index=self._index, content_block=block)

    def _end_block(self) -> Iterator[bytes]:
        if self._open is not None:
            self._open = None
            yield event("content_block_stop", index=self._index)

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return event("content_block_delta", index=self._index, delta=delta)


def _object(arguments: str) -> Any:
    """Arguments that the token limit cut off are no JSON; such a call is shown without any."""
    try:
        return json.loads(arguments)
    except ValueError:
        return {}


def _message(head: Heading, *, content: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": head.id,
        "type": "message",
        "role": "assistant",
        "model": head.model,
        "content": content,
        "stop_reason": None,
        "stop_sequence": None,
        "usage": usage,
    }


def _tool_use(tool_id: str, name: str, *, input_: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": tool_id, "name": name, "input": input_}


def _usage(ending: Ending) -> dict[str, Any]:
    """Anthropic counts apart what came from the cache. Says, too, whether experts stood in for others."""
    return {
        "input_tokens": ending.prompt_tokens - ending.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": ending.cached_tokens,
        "output_tokens": ending.completion_tokens,
        **substitutions([ending]),
    }


def _stop(head: Heading, ending: Ending, *, num_calls: int) -> dict[str, Any]:
    reason = "tool_use" if num_calls else "end_turn"
    if ending.reason == "length":
        is_as_asked = ending.completion_tokens >= head.max_tokens
        reason = "max_tokens" if is_as_asked else "model_context_window_exceeded"
    elif ending.stopped_by is not None:
        reason = "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": ending.stopped_by}


def event(kind: str, **fields: Any) -> bytes:
    """One server-sent event of the kind that its data say."""
    return _event(kind, {"type": kind, **fields})


def _event(kind: str, data: dict[str, Any]) -> bytes:
    line = to_json(data)
    for char, escaped in LINE_BREAKS.items():
        line = line.replace(char, escaped)
    return b"event: " + kind.encode() + b"\ndata: " + line + b"\n\n"
