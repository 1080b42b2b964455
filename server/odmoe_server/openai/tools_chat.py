"""Calls as chat completions write them, whole and in chunks. Knows OpenAI's shapes and the parser of calls."""

from collections.abc import Iterator
from typing import Any

from odmoe_server.assembly import Piece
from odmoe_server.generation import Ending
from odmoe_server.openai.tools_format import ToolFormat
from odmoe_server.openai.tools_parse import CallArguments, CallBegun, CallEvent, CallParser, Said, read_calls


class ChatCalls:
    """The calls in all choices of one answer."""

    def __init__(self, form: ToolFormat, *, answer_id: str) -> None:
        self._form = form
        self._answer_id = answer_id.rpartition("-")[2]
        self._parsers: dict[int, CallParser] = {}

    def deltas(self, index: int, part: Piece | Ending) -> Iterator[dict[str, Any]]:
        """What the next part adds to a choice."""
        parser = self._parsers.setdefault(index, CallParser(self._form))
        for event in parser.flush() if isinstance(part, Ending) else parser.push(part.text):
            yield self._delta(index, event)

    def message(self, index: int, text: str) -> dict[str, Any]:
        """A whole choice."""
        parser = self._parsers[index] = CallParser(self._form)
        said, calls = read_calls(parser, text)
        if not calls:
            return {"content": said}
        written = [
            {"id": self._id(index, i), "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for i, call in enumerate(calls)
        ]
        return {"content": said or None, "tool_calls": written}

    def ends_answer(self, index: int, ending: Ending) -> bool:
        """Whether the answer ended in order to have calls made."""
        is_own_end = ending.reason == "stop" and ending.stopped_by is None
        return is_own_end and self._parsers[index].num_calls > 0

    def _delta(self, index: int, event: CallEvent) -> dict[str, Any]:
        match event:
            case Said(text):
                return {"content": text}
            case CallBegun(call, name):
                function = {"name": name, "arguments": ""}
                begun = {"index": call, "id": self._id(index, call), "type": "function", "function": function}
                return {"tool_calls": [begun]}
            case CallArguments(call, piece):
                return {"tool_calls": [{"index": call, "function": {"arguments": piece}}]}

    def _id(self, index: int, call: int) -> str:
        return f"call_{self._answer_id}{index:02d}{call:02d}"
