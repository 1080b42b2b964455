"""How a generation is written: one JSON body, or server-sent events. Knows OpenAI's answer shapes only.

Does not wait, read clocks or know sockets; `sse` does the waiting.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from odmoe_server.generation import Ending, Piece
from odmoe_server.openai.errors import problem_of
from odmoe_server.openai.schemas import (
    AssistantMessage,
    ChatChunk,
    ChatCompletion,
    Choice,
    ChunkChoice,
    CompletionTokensDetails,
    Delta,
    FinishReason,
    PromptTokensDetails,
    Usage,
)

DONE = b"data: [DONE]\n\n"
# JSON may hold these as they are, but clients that cut a stream into lines by Unicode's rules would cut here.
_LINE_BREAKS = {ord(char): f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}


@dataclass(frozen=True, kw_only=True)
class Letterhead:
    """What every chunk and body of one answer repeats. `created` is unix time in seconds."""

    id: str
    created: int
    model: str
    system_fingerprint: str

    def fields(self) -> dict[str, Any]:
        """As keyword arguments of an answer."""
        return {
            "id": self.id,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
        }


def body(head: Letterhead, *, text: str, ending: Ending) -> bytes:
    """A whole answer."""
    message = AssistantMessage(role="assistant", content=text, refusal=None)
    choice = Choice(index=0, message=message, logprobs=None, finish_reason=ending.reason)
    completion = ChatCompletion(**head.fields(), object="chat.completion", choices=[choice], usage=usage(ending))
    return completion.model_dump_json().encode()


def usage(ending: Ending) -> Usage:
    """Token counts; nothing is cached between requests yet, and no reasoning is hidden."""
    return Usage(
        prompt_tokens=ending.prompt_tokens,
        completion_tokens=ending.completion_tokens,
        total_tokens=ending.prompt_tokens + ending.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=0),
        completion_tokens_details=CompletionTokensDetails(reasoning_tokens=0),
    )


class ChunkWriter:
    """The events of one streamed answer: the role once, text, one finish reason, usage if asked, [DONE]."""

    def __init__(self, head: Letterhead, *, include_usage: bool) -> None:
        self.head = head
        self._include_usage = include_usage
        self._begun = False

    def write(self, part: Piece | Ending) -> Iterator[bytes]:
        """The events for one part of the answer."""
        if not self._begun:
            self._begun = True
            yield self._choice(Delta(role="assistant", content=""))
        if isinstance(part, Piece):
            if part.text:
                yield self._choice(Delta(content=part.text))
            return
        yield self._choice(Delta(), finish_reason=part.reason)
        if self._include_usage:
            yield self._event(choices=[], usage=usage(part))
        yield DONE

    def _choice(self, delta: Delta, *, finish_reason: FinishReason | None = None) -> bytes:
        return self._event(choices=[ChunkChoice(index=0, delta=delta, logprobs=None, finish_reason=finish_reason)])

    def _event(self, **fields: Any) -> bytes:
        chunk = ChatChunk(**self.head.fields(), object="chat.completion.chunk", **fields)
        line = chunk.model_dump_json(exclude_unset=True).translate(_LINE_BREAKS)
        return b"data: " + line.encode() + b"\n\n"


def error_event(error: Exception) -> bytes:
    """What a stream ends with when it breaks off."""
    return b"data: " + json.dumps(problem_of(error).body).encode() + b"\n\n"
