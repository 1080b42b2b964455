"""Request bodies off the wire: their size, their type, their time. Knows ASGI and JSON; no field of any API."""

import asyncio
from typing import Final, TypeVar

import anyio.to_thread
from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.requests import Request

from odmoe_server.openai.body import parse
from odmoe_server.openai.errors import BodyTooLarge, BodyTooSlow, MalformedBody

# Parsing this much takes about a millisecond; more is parsed in a thread.
_PARSE_INLINE_BYTES: Final = 256 * 1024
_BODY_TIMEOUT_S: Final = 60.0
B = TypeVar("B", bound=BaseModel)


async def read(request: Request, kind: type[B], *, limit_bytes: int) -> B:
    """The body of a request, checked. Raises what the error table knows."""
    body = await read_json(request, limit_bytes=limit_bytes)
    if len(body) <= _PARSE_INLINE_BYTES:
        return parse(kind, body)
    return await anyio.to_thread.run_sync(parse, kind, body)


async def read_json(request: Request, *, limit_bytes: int) -> bytes:
    """The body of a request that says it is JSON. Raises `MalformedBody` or `BodyTooLarge`, the latter before all of
    it has been read."""
    _check_headers(request.headers, limit_bytes=limit_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_TIMEOUT_S):
            async for piece in request.stream():
                body += piece
                if len(body) > limit_bytes:
                    raise BodyTooLarge(_too_large(limit_bytes))
    except TimeoutError:
        raise BodyTooSlow(f"The request body was not here after {_BODY_TIMEOUT_S:.0f} seconds.") from None
    return bytes(body)


def _check_headers(headers: Headers, *, limit_bytes: int) -> None:
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise MalformedBody(f"The content type must be application/json, not '{kind}'. Send it as a header.")
    if (coding := headers.get("content-encoding", "identity").strip().lower()) != "identity":
        raise MalformedBody(f"Bodies in '{coding}' are not taken. Send it without a content encoding.")
    length = headers.get("content-length", "0")
    if length.isdecimal() and int(length) > limit_bytes:
        raise BodyTooLarge(_too_large(limit_bytes))


def _too_large(limit_bytes: int) -> str:
    return f"The request body is larger than this server takes ({limit_bytes} bytes)."
