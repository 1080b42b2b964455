"""Sleeping until there is something to do. Knows sockets and a file descriptor, no messages."""

import math
import os
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import zmq

if TYPE_CHECKING:
    from odmoe_wire.link import Link

# A sleep is cut to this, so that no wait is without an end whatever the caller computed.
MAX_WAIT_S: Final = 60.0


class Wake:
    """A flag that ends a `wait`: set it from any thread; it stays set until cleared. Its pipe is made for the first
    `wait`, so that who never sleeps holds no descriptors."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pipe: tuple[int, int] | None = None
        self._is_set = False
        self._closed = False

    def set(self) -> None:
        """End the present or else the next `wait`. After `close` this does nothing."""
        with self._lock:
            if not self._is_set and not self._closed:
                self._is_set = True
                if self._pipe is not None:
                    os.write(self._pipe[1], b"\0")

    def clear(self) -> None:
        """Forget that it was set. Clear first, then look at what was signalled, so that nothing is missed."""
        with self._lock:
            if self._is_set and not self._closed:
                self._is_set = False
                if self._pipe is not None:
                    os.read(self._pipe[0], 1)

    def fileno(self) -> int:
        """Readable while set. Raises ValueError after `close`."""
        with self._lock:
            if self._closed:
                raise ValueError("the wake is closed")
            if self._pipe is None:
                self._pipe = os.pipe()
                if self._is_set:
                    os.write(self._pipe[1], b"\0")
            return self._pipe[0]

    def close(self) -> None:
        """Give the descriptors back; may be called twice."""
        with self._lock:
            if not self._closed:
                self._closed = True
                for descriptor in self._pipe or ():
                    os.close(descriptor)


def wait(links: "Sequence[Link]", wake: Wake, *, timeout_s: float) -> "Sequence[Link] | None":
    """Sleep until a link may have something, `wake` is set, or `timeout_s` (rounded up to ms) is over.

    The links that have, or None at the time-out. One without a socket (loopback) lives in virtual time: no sleep then,
    and all may have.
    """
    watched: list[tuple[Any, int]] = [(wake.fileno(), zmq.POLLIN)]
    for link in links:
        if link.socket is None:
            return links
        watched.append((link.socket, zmq.POLLIN))
    found = [thing for thing, _ in zmq.zmq_poll(watched, math.ceil(1000 * min(max(timeout_s, 0.0), MAX_WAIT_S)))]
    return [link for link in links if link.socket in found] if found else None
