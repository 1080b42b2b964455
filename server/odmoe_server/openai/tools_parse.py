"""Reads calls of tools out of an answer's text as it comes. Knows the format and JSON's brackets; knows no tokens.

Under a grammar the text is exactly in the format. Without one whatever does not fit stays text, and is never lost.
"""

from dataclasses import dataclass
from typing import Literal

from odmoe_server.openai.tools_format import ToolFormat


@dataclass(frozen=True)
class Said:
    """Text that is no call."""

    text: str


@dataclass(frozen=True)
class CallBegun:
    """A call of the function `name`; `index` counts the calls of this answer."""

    index: int
    name: str


@dataclass(frozen=True)
class CallArguments:
    """More of the JSON of the call's arguments."""

    index: int
    json: str


CallEvent = Said | CallBegun | CallArguments


class JsonEnd:
    """Finds the end of a JSON object in text that comes in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = False

    def find(self, text: str) -> int | None:
        """The length of `text` up to and with the object's last bracket, or None."""
        for i, char in enumerate(text):
            if self._in_string:
                self._in_string = self._escaped or char != '"'
                self._escaped = not self._escaped and char == "\\"
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return i + 1
        return None


class CallParser:
    """One answer. Nothing that may still become a call is let out as text, nor the whitespace before a call."""

    def __init__(self, form: ToolFormat) -> None:
        self._form = form
        self._state: Literal["text", "name", "arguments", "behind"] = "text"
        self._held = ""
        self._json_end = JsonEnd()
        self._index = -1
        self._events: list[CallEvent] = []

    @property
    def num_calls(self) -> int:
        """Calls that have begun."""
        return self._index + 1

    def push(self, text: str) -> list[CallEvent]:
        """What is certain now that `text` has come."""
        self._held += text
        readers = {"text": self._text, "name": self._name, "arguments": self._arguments, "behind": self._behind}
        while self._held and readers[self._state]():
            pass
        return self._taken()

    def flush(self) -> list[CallEvent]:
        """What is left at the answer's end: beginnings that became no call are text."""
        if self._state == "name":
            self._held = self._form.begin + self._held
        elif self._state == "behind" and self._form.end.startswith(self._held):
            self._held = ""  # cut off by the token limit
        self._say(self._held)
        self._held = ""
        return self._taken()

    # Each reader takes what it can of the held text, and says whether the next one may go on.

    def _text(self) -> bool:
        said, begun, rest = self._held.partition(self._form.begin)
        if begun:
            self._say(said.rstrip())
            self._state, self._held = "name", rest
            return True
        certain = len(said) - possible_beginning(said, self._form.begin)
        shown = said[:certain].rstrip()
        self._say(shown)
        self._held = said[len(shown) :]
        return False

    def _name(self) -> bool:
        name, found, rest = self._held.partition(self._form.middle)
        if not found:
            return False
        self._index += 1
        self._events.append(CallBegun(self._index, name))
        self._state, self._held, self._json_end = "arguments", rest, JsonEnd()
        return True

    def _arguments(self) -> bool:
        end = self._json_end.find(self._held)
        piece, self._held = self._held[:end], "" if end is None else self._held[end:]
        self._events.append(CallArguments(self._index, piece))
        if end is None:
            return False
        self._state = "behind"
        return True

    def _behind(self) -> bool:
        form = self._form
        if self._held.startswith(form.between):
            self._state, self._held = "name", self._held.removeprefix(form.between)
            return True
        if form.between.startswith(self._held):
            return False  # another call may follow
        if form.end.startswith(self._held) and self._held != form.end:
            return False
        self._state, self._held = "text", self._held.removeprefix(form.end)
        return True

    def _say(self, text: str) -> None:
        if text:
            self._events.append(Said(text))

    def _taken(self) -> list[CallEvent]:
        events, self._events = self._events, []
        return events


def possible_beginning(text: str, mark: str) -> int:
    """Length of the longest end of `text` that begins `mark`."""
    longest = min(len(text), len(mark) - 1)
    return next((length for length in range(longest, 0, -1) if mark.startswith(text[-length:])), 0)


@dataclass
class Call:
    """A whole call; `arguments` is JSON, or its beginning where the token limit cut it off."""

    name: str
    arguments: str = ""


def read_calls(parser: CallParser, text: str) -> tuple[str, list[Call]]:
    """A whole answer: its text and its calls."""
    said, calls = [], []
    for event in [*parser.push(text), *parser.flush()]:
        match event:
            case Said(piece):
                said.append(piece)
            case CallBegun(_, name):
                calls.append(Call(name))
            case CallArguments(index, piece):
                calls[index].arguments += piece
    return "".join(said), calls
