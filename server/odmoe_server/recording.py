"""Recordings that never make anybody wait: a queue, a thread that empties it, and a file of bounded size.

Knows threads and files; knows not what is recorded. Whoever is recorded only appends to a bounded queue. When the
disk cannot keep up, items are dropped and counted; when it fails, the recording ends and the work goes on.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Generic, Protocol, TypeVar

log = logging.getLogger(__name__)

ItemT = TypeVar("ItemT")
ItemT_contra = TypeVar("ItemT_contra", contravariant=True)

MAX_WAITING: Final = 1 << 16
FLUSH_EVERY_S: Final = 0.5
CLOSE_TIMEOUT_S: Final = 5.0


class Sink(Protocol[ItemT_contra]):
    """Where a recording goes."""

    def write(self, items: Sequence[ItemT_contra], dropped: int) -> None:
        """Take items, in order; `dropped` were left out since the last time."""
        ...

    def close(self) -> None:
        """Nothing comes any more."""
        ...


class Recorder(Generic[ItemT]):
    """`put` from any thread; the sink is used on the recorder's own thread, or, without `start`, in `flush` and
    `close`."""

    def __init__(self, sink: Sink[ItemT], *, name: str, max_waiting: int = MAX_WAITING) -> None:
        self._sink = sink
        self._name = name
        self._max_waiting = max_waiting
        self._items: deque[ItemT] = deque()
        self._dropped = 0
        self._lock = threading.Lock()  # of the count above; never held while anything is written
        self._broken = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def put(self, item: ItemT) -> None:
        """Record an item; never waits for the disk."""
        if self._broken:
            return
        if len(self._items) < self._max_waiting:
            self._items.append(item)
        else:
            with self._lock:
                self._dropped += 1

    def start(self) -> None:
        """Write twice a second from now on."""
        self._thread.start()

    def close(self) -> None:
        """Write what is left and end."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(CLOSE_TIMEOUT_S)
        else:
            self._end()

    def flush(self) -> None:
        """Write all that waits; on the thread that writes."""
        items = [self._items.popleft() for _ in range(len(self._items))]
        with self._lock:
            dropped, self._dropped = self._dropped, 0
        if (not items and not dropped) or self._broken:
            return
        try:
            self._sink.write(items, dropped)
        except Exception:  # outermost: a recording that fails must not end what is recorded
            self._broken = True
            self._items.clear()
            log.exception("%s cannot be written and ends here", self._name)

    def _run(self) -> None:
        while not self._stopping.wait(FLUSH_EVERY_S):
            self.flush()
        self._end()

    def _end(self) -> None:
        self.flush()
        self._sink.close()


class CappedFile:
    """A file that is whole after every `append`: a head, what was appended, and a tail that gives way to the next
    append. When it would grow over `cap_bytes` it becomes FILE.1, in place of an older one, and begins anew; so does
    a file that is there at the start. Raises ValueError when it cannot be made."""

    def __init__(self, path: Path, *, cap_bytes: int, head: Callable[[], bytes]) -> None:
        self.path = path
        self._cap_bytes = cap_bytes
        self._head = head
        try:
            self._begin()
        except OSError as error:
            raise ValueError(f"{path} cannot be written: {error.strerror}") from None

    @property
    def previous(self) -> Path:
        """Where the file before this one is."""
        return self.path.with_name(self.path.name + ".1")

    def append(self, body: bytes, *, tail: bytes = b"") -> None:
        """Add `body` and put `tail` behind it. Raises OSError."""
        if self._end + len(body) + len(tail) > self._cap_bytes and self._end > self._head_bytes:
            self._file.close()
            self._begin()
        self._file.seek(self._end)
        self._file.write(body + tail)
        self._file.truncate()
        self._file.flush()
        self._end += len(body)

    def close(self) -> None:
        """Nothing is appended any more."""
        self._file.close()

    def _begin(self) -> None:
        if self.path.is_file():
            self.path.replace(self.previous)
        self._file = self.path.open("wb")
        head = self._head()
        self._file.write(head)
        self._file.flush()
        self._end = self._head_bytes = len(head)
