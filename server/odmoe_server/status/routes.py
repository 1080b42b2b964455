"""GET / and the feed behind it. Knows HTTP and the page; the figures are `feed`'s business.

The page itself tells nothing and needs no key; the feed, which tells all, does. Nothing is fetched from elsewhere: the
browser is told to refuse it.
"""

import asyncio
import base64
import hashlib
import re
import time
from collections.abc import AsyncGenerator, Callable
from importlib.resources import files
from typing import Final

import msgspec
from fastapi import FastAPI
from starlette.responses import HTMLResponse, Response

from odmoe_server.engine_api import Engine, NotReady, QueueFull
from odmoe_server.openai.errors import SHUTTING_DOWN, problem_of
from odmoe_server.sse import EventStream
from odmoe_server.status.feed import Feed

EVERY_S: Final = 0.5
# Each costs a connection and a picture twice a second.
MAX_WATCHERS: Final = 32


class Watchers:
    """Who looks at the moment."""

    def __init__(self, engine: Engine, *, version: str, model: str, is_leaving: Callable[[], bool]) -> None:
        self._engine = engine
        self._version = version
        self._model = model
        self._is_leaving = is_leaving
        self._count = 0

    def stream(self) -> EventStream:
        """A stream for one more. Raises QueueFull."""
        if self._count >= MAX_WATCHERS:
            raise QueueFull(f"{self._count} status pages are open already", retry_after_s=10.0)
        self._count += 1
        farewell = msgspec.json.encode(problem_of(NotReady(SHUTTING_DOWN)).body)
        return EventStream(self._events(), close=self._close, farewell=lambda: b"data: " + farewell + b"\n\n")

    async def _events(self) -> AsyncGenerator[bytes, None]:
        feed = Feed(version=self._version, model=self._model)
        while not self._is_leaving():
            status = feed.status(self._engine.health(), time.monotonic())
            yield b"data: " + msgspec.json.encode(status) + b"\n\n"
            await asyncio.sleep(EVERY_S)

    async def _close(self) -> None:
        self._count -= 1


def add_routes(app: FastAPI, *, watchers: Watchers) -> None:
    """Add the page and its feed to an application."""
    page = files("odmoe_server.status").joinpath("page.html").read_text(encoding="utf-8")
    headers = {
        "content-security-policy": content_security_policy(page),
        "cache-control": "no-cache",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def status_page() -> Response:
        return HTMLResponse(page, headers=headers)

    @app.get("/status/events", include_in_schema=False)
    async def status_events() -> Response:
        return watchers.stream()


def content_security_policy(page: str) -> str:
    """Only this page's own script and styles run, and they speak with this server alone."""

    def digests(tag: str) -> str:
        blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
        return " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()}'" for block in blocks
        )

    return (
        f"default-src 'none'; script-src {digests('script')}; style-src {digests('style')}; connect-src 'self';"
        " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
