"""Leaving in good order: what was admitted is finished within a bound, what comes now is told to come again elsewhere.

Knows ASGI and uvicorn; knows no routes but the probes'. The port stays open meanwhile: whoever comes gets a 503 with
Retry-After, and a load balancer sees the probe turn.
"""

import json
import logging
import time
from collections.abc import Callable
from types import FrameType
from typing import Final

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from odmoe_server.engine_api import NotReady
from odmoe_server.openai.errors import SHUTTING_DOWN, problem_of

log = logging.getLogger(__name__)

# That the process lives (/health/live) stays true while it drains.
PROBES: Final = frozenset({"/health", "/health/ready"})
# For what the time for draining was not enough for: time to tell the clients so.
LAST_WORDS_S: Final = 1


class Drain:
    """The outermost layer of the application: counts what is under way, and once begun lets nothing new in. GETs that
    only look (metrics, status) go on."""

    def __init__(self, app: ASGIApp, *, drain_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._app = app
        self._drain_s = drain_s
        self._clock = clock
        self._until_s: float | None = None
        self.under_way = 0

    @property
    def has_begun(self) -> bool:
        """Whether nothing new is let in any more."""
        return self._until_s is not None

    @property
    def is_over(self) -> bool:
        """Whether all is finished, or the time is up."""
        return self._until_s is not None and (self.under_way == 0 or self._clock() >= self._until_s)

    def begin(self) -> bool:
        """Let nothing new in; false if that was so already."""
        if self.has_begun:
            return False
        self._until_s = self._clock() + self._drain_s
        log.info("leaving; %d requests under way have %g s to finish", self.under_way, self._drain_s)
        return True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asks = scope["method"] not in ("GET", "HEAD")
        if self.has_begun and (asks or scope["path"] in PROBES):
            await _refuse(send)
            return
        self.under_way += asks
        try:
            await self._app(scope, receive, send)
        finally:
            self.under_way -= asks


async def _refuse(send: Send) -> None:
    problem = problem_of(NotReady(SHUTTING_DOWN))
    content = json.dumps(problem.body).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(content)),
        "connection": "close",
        **problem.headers,
    }
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": problem.status, "headers": raw})
    await send({"type": "http.response.body", "body": content})


class DrainingServer(uvicorn.Server):
    """uvicorn that drains at the first SIGINT or SIGTERM and ends at the second."""

    def __init__(self, config: uvicorn.Config, *, drain: Drain) -> None:
        super().__init__(config)
        self._drain = drain
        config.timeout_graceful_shutdown = LAST_WORDS_S

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by uvicorn for each signal."""
        super().handle_exit(sig, frame)
        if self._drain.begin():
            self.should_exit = False  # on_tick says when

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second; true to end."""
        if self._drain.is_over:
            self.should_exit = True
        return await super().on_tick(counter)
