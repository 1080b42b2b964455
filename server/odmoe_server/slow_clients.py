"""Connections that do not get to the point are closed: uvicorn itself waits for ever for a request's head.

Without this, a client that opens connections and says nothing, or one byte a minute, takes every file descriptor.
Knows uvicorn's protocol class; the body's time is `bodies`' business.
"""

import asyncio
import logging
from typing import Final

from uvicorn.protocols.http.h11_impl import H11Protocol

log = logging.getLogger(__name__)

HEAD_S: Final = 15.0


class HastyProtocol(H11Protocol):
    """HTTP/1.1, with `HEAD_S` for each request's head from the moment it could begin."""

    head_s: float = HEAD_S
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called by the event loop."""
        super().connection_made(transport)
        self._mind_head()

    def data_received(self, data: bytes) -> None:
        """Called by the event loop."""
        super().data_received(data)
        self._mind_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the event loop."""
        super().connection_lost(exc)
        self._forget_head()

    def _mind_head(self) -> None:
        """While a request is served there is no head to wait for; between two, uvicorn's own time-out for idle
        connections runs until the next one's first byte."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._forget_head()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_s, self._give_up)

    def _forget_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self) -> None:
        self._head_timer = None
        is_busy = self.cycle is not None and not self.cycle.response_complete
        if not is_busy and not self.transport.is_closing():
            log.info("closed a connection that sent no whole request in %g s", self.head_s)
            self.transport.close()
