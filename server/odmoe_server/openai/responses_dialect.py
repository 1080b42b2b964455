"""How a response is written: one resource, or typed events. Knows OpenAI's shapes only; waits for nothing."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from odmoe_server.answering import Answer
from odmoe_server.assembly import Piece
from odmoe_server.generation import Ending
from odmoe_server.openai.errors import problem_of
from odmoe_server.openai.render import LINE_BREAKS, substitutions, to_json
from odmoe_server.openai.responses_schemas import ResponsesRequest
from odmoe_server.openai.tools_format import ToolFormat
from odmoe_server.openai.tools_parse import CallArguments, CallBegun, CallEvent, CallParser, Said

Item = dict[str, Any]


class Cancelled(Exception):
    """The client has cancelled the response, from elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Told:
    """What the writing of a response has to do with others: whether it was cancelled meanwhile, what time it is, and
    whom to tell when its last state is known."""

    is_cancelled: Callable[[], bool]
    clock: Callable[[], float]
    complete: Callable[[Item], None]


class ResponsesDialect:
    """One response. See `answering.Dialect`. `resource` is what it was when it began."""

    def __init__(self, resource: Item, *, form: ToolFormat | None, told: Told) -> None:
        self.resource = resource
        self._told = told
        self._parser = None if form is None else CallParser(form)
        self._items = _Items(resource["id"].removeprefix("resp_"))
        self._sequence = 0
        self._begun = False

    def events(self, index: int, part: Piece | Ending) -> Iterator[bytes]:
        """See `answering.Dialect`. Raises `Cancelled`."""
        if self._told.is_cancelled():
            raise Cancelled("The response was cancelled.")
        if not self._begun:
            self._begun = True
            yield self._event("response.created", response=self.resource)
            yield self._event("response.in_progress", response=self.resource)
        for kind, fields in self._changes(part):
            yield self._event(kind, **fields)

    def closing(self) -> Iterable[bytes]:
        """See `answering.Dialect`."""
        yield self._event(f"response.{self.resource['status']}", response=self.resource)

    def error_event(self, error: Exception) -> bytes:
        """See `answering.Dialect`. A response that breaks off has failed, unless the client wanted it so."""
        problem = problem_of(error).body["error"]
        if isinstance(error, Cancelled):
            self._ended(status="cancelled")
            return self._event("response.incomplete", response=self.resource)
        failure = {"code": "server_error", "message": problem["message"]}
        self._ended(status="failed", error=failure)
        return self._event("response.failed", response=self.resource)

    def body(self, answers: Sequence[Answer]) -> bytes:
        """See `answering.Dialect`."""
        (answer,) = answers
        for part in (Piece(answer.text), answer.ending):
            for _ in self._changes(part):
                pass
        return to_json(self.resource)

    def _changes(self, part: Piece | Ending) -> Iterator[tuple[str, Item]]:
        if isinstance(part, Piece):
            found = self._parser.push(part.text) if self._parser else [Said(part.text)] if part.text else []
        else:
            found = self._parser.flush() if self._parser else []
        for said in found:
            yield from self._items.add(said)
        if isinstance(part, Ending):
            is_cut = part.reason == "length"
            yield from self._items.end("incomplete" if is_cut else "completed")
            details = {"incomplete_details": {"reason": "max_output_tokens"}} if is_cut else {}
            self._ended(status="incomplete" if is_cut else "completed", usage=usage(part), **details)

    def _ended(self, *, status: str, **fields: Any) -> None:
        completed_at = self._told.clock() if status == "completed" else None
        self.resource = {
            **self.resource,
            "status": status,
            "completed_at": completed_at,
            "output": self._items.output,
            **fields,
        }
        self._told.complete(self.resource)

    def _event(self, kind: str, **fields: Any) -> bytes:
        line = to_json({"type": kind, "sequence_number": self._sequence, **fields})
        self._sequence += 1
        for char, escaped in LINE_BREAKS.items():
            line = line.replace(char, escaped)
        return b"event: " + kind.encode() + b"\ndata: " + line + b"\n\n"


class _Items:
    """The items of the output, each ended before the next is begun. Events are (type, fields)."""

    def __init__(self, suffix: str) -> None:
        self.output: list[Item] = []
        self._suffix = suffix
        self._is_open = False

    def add(self, said: CallEvent) -> Iterator[tuple[str, Item]]:
        match said:
            case Said(text):
                if not (self._is_open and self._kind == "message"):
                    yield from self.end("completed")
                    yield from self._begin_message()
                self._part["text"] += text
                yield "response.output_text.delta", {**self._place, "content_index": 0, "delta": text, "logprobs": []}
            case CallBegun(_, name):
                yield from self.end("completed")
                yield from self._begin_call(name)
            case CallArguments(_, piece):
                self.output[-1]["arguments"] += piece
                yield "response.function_call_arguments.delta", {**self._place, "delta": piece}

    def end(self, status: str) -> Iterator[tuple[str, Item]]:
        """End the item that is open, if one is."""
        if not self._is_open:
            return
        self._is_open = False
        item, place = self.output[-1], self._place
        if self._kind == "message":
            text = self._part["text"]
            done = {**place, "content_index": 0}
            yield "response.output_text.done", {**done, "text": text, "logprobs": []}
            yield "response.content_part.done", {**done, "part": self._part}
        else:
            done = {**place, "arguments": item["arguments"], "name": item["name"]}
            yield "response.function_call_arguments.done", done
        item["status"] = status
        yield "response.output_item.done", {"output_index": len(self.output) - 1, "item": item}

    @property
    def _kind(self) -> str:
        return str(self.output[-1]["type"])

    @property
    def _place(self) -> Item:
        return {"item_id": self.output[-1]["id"], "output_index": len(self.output) - 1}

    @property
    def _part(self) -> Item:
        part: Item = self.output[-1]["content"][0]
        return part

    def _begin_message(self) -> Iterator[tuple[str, Item]]:
        head = {"id": f"msg_{self._suffix}{len(self.output):02d}", "type": "message", "role": "assistant"}
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        yield self._added({**head, "status": "in_progress", "content": []})
        self.output[-1]["content"] = [part]
        yield "response.content_part.added", {**self._place, "content_index": 0, "part": dict(part)}

    def _begin_call(self, name: str) -> Iterator[tuple[str, Item]]:
        number = f"{self._suffix}{len(self.output):02d}"
        call = {"id": f"fc_{number}", "type": "function_call", "call_id": f"call_{number}", "name": name}
        yield self._added({**call, "arguments": "", "status": "in_progress"})

    def _added(self, item: Item) -> tuple[str, Item]:
        self.output.append(item)
        self._is_open = True
        return "response.output_item.added", {"output_index": len(self.output) - 1, "item": dict(item)}


def usage(ending: Ending) -> Item:
    """Token counts; no reasoning is hidden."""
    return {
        "input_tokens": ending.prompt_tokens,
        "input_tokens_details": {"cached_tokens": ending.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": ending.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": ending.prompt_tokens + ending.completion_tokens,
        **substitutions([ending]),
    }


def begun(asked: ResponsesRequest, *, response_id: str, created_at: int, temperature: float, top_p: float) -> Item:
    """The resource as it is before there is an answer."""
    text = asked.text.model_dump(by_alias=True, exclude_none=True) if asked.text else {"format": {"type": "text"}}
    tools = [{"description": None, **tool.model_dump()} for tool in asked.tools or ()]
    choice = asked.tool_choice or "auto"
    return {
        "id": response_id,
        "object": "response",
        "created_at": created_at,
        "completed_at": None,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": asked.instructions,
        "max_output_tokens": asked.max_output_tokens,
        "max_tool_calls": None,
        "model": asked.model,
        "output": [],
        "parallel_tool_calls": asked.parallel_tool_calls is not False,
        "previous_response_id": asked.previous_response_id,
        "prompt_cache_key": asked.prompt_cache_key,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": asked.safety_identifier,
        "service_tier": "default",
        "store": asked.store is not False,
        "temperature": temperature,
        "text": text,
        "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
        "tools": tools,
        "top_logprobs": 0,
        "top_p": top_p,
        "truncation": "disabled",
        "usage": None,
        "user": asked.user,
        "metadata": asked.metadata or {},
    }
