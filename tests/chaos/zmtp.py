"""What of a ZMTP 3 byte stream is one message: enough of the protocol to lose, repeat or delay whole messages.

Pure: bytes in, chunks out. Knows neither sockets nor what a message says. Without encryption only: CURVE's boxes carry
a counter, and libzmq itself drops the connection of who repeats one.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

GREETING_BYTES: Final = 64
_MORE, _LONG, _COMMAND = 1, 2, 4


@dataclass(frozen=True)
class Chunk:
    """Bytes that belong together; a fault may befall those that are a message of the application's."""

    data: bytes
    is_message: bool


@dataclass
class Splitter:
    """One direction of one connection."""

    _kept: bytearray = field(default_factory=bytearray)
    _greeting_left: int = GREETING_BYTES

    def feed(self, data: bytes) -> Iterator[Chunk]:
        """All chunks that are whole now. The greeting goes through as it comes: each side waits for the other's."""
        if self._greeting_left:
            greeting = data[: self._greeting_left]
            self._greeting_left -= len(greeting)
            yield Chunk(greeting, is_message=False)
            data = data[len(greeting) :]
        self._kept += data
        while (end := self._end_of_chunk()) is not None:
            is_command = bool(self._kept[0] & _COMMAND)
            yield Chunk(bytes(self._kept[:end]), is_message=not is_command)
            del self._kept[:end]

    def _end_of_chunk(self) -> int | None:
        """Where the first command or message (with all its frames) ends; None when it is not whole yet."""
        at = 0
        while (frame := self._frame(at)) is not None:
            at, more = frame
            if not more:
                return at
        return None

    def _frame(self, at: int) -> tuple[int, bool] | None:
        """(end, whether more frames follow) of the frame at an offset."""
        kept = self._kept
        if len(kept) < at + 2:
            return None
        flags = kept[at]
        head = 9 if flags & _LONG else 2
        if len(kept) < at + head:
            return None
        size = int.from_bytes(kept[at + 1 : at + head], "big")
        end = at + head + size
        return None if len(kept) < end else (end, bool(flags & _MORE))
