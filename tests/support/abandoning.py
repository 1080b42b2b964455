"""Clients that ask over a socket and hang up, many at once. Knows no route: callers say what is asked."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

from support.http_served import DEADLINE_S


async def ask_and_leave(
    url: str,
    path: str,
    body: dict[str, Any],
    *,
    wait: Callable[[asyncio.StreamReader], Awaitable[object]],
    by_reset: bool,
) -> None:
    """POST `body`, `wait` for as much of the answer as is wanted, and hang up, by a reset in place of a farewell if so
    said."""
    host, port = url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    writer.write(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
    await writer.drain()
    await wait(reader)
    writer.transport.abort() if by_reset else writer.close()


def crowd(one: Callable[[int], Awaitable[None]], *, number: int) -> None:
    """Run so many clients at once, each by its number."""

    async def all_of_them() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await asyncio.gather(*(one(client) for client in range(number)))

    asyncio.run(all_of_them())


def aborted_total(page: str) -> float:
    """Of the metrics page: answers that nobody waited for."""
    lines = [line for line in page.splitlines() if line.startswith("odmoe:request_success_total") and "abort" in line]
    return sum(float(line.rpartition(" ")[2]) for line in lines)
