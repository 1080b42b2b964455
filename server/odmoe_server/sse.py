"""Waiting, for answers that come slowly: keep-alive comments, and noticing that the client has gone.

Knows ASGI and asyncio. Does not know what is being waited for.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from odmoe_server.pump import end

T = TypeVar("T")

KEEP_ALIVE = b": keep-alive\n\n"
CLIENT_GONE_STATUS = 499


class ClientGone(Exception):
    """The client hung up before its answer was complete."""


async def unless_client_leaves(work: Coroutine[Any, Any, T], *, receive: Receive) -> T:
    """The result of `work`, which is cancelled when the client hangs up; then raises `ClientGone`.

    The request's body must have been read already.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_hung_up(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        await end(task, watch)


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A stream of server-sent events. `close` is awaited at the end, also if the client hangs up or never listened.
    What `farewell` gives is sent last when the server has to break the stream off."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        *,
        close: Callable[[], Awaitable[None]],
        farewell: Callable[[], bytes],
    ) -> None:
        self.status_code = 200
        self.background = None
        self._events = events
        self._close = close
        self._farewell = farewell
        self._begun = False
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(ClientGone):
                await unless_client_leaves(self._send_all(send), receive=receive)
        except asyncio.CancelledError:
            if self._begun:
                await send(_body(self._farewell(), more=False))
            raise
        finally:
            await self._events.aclose()
            await self._close()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        self._begun = True
        async for event in self._events:
            await send(_body(event, more=True))
        await send(_body(b"", more=False))


def _body(content: bytes, *, more: bool) -> Message:
    return {"type": "http.response.body", "body": content, "more_body": more}
