"""Reads several generators side by side, for a consumer that takes what there is and waits with patience.

Knows asyncio. Does not know what is read. What a slow consumer has not taken is bounded; then the sources wait.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from typing import Any, Final, Generic, TypeVar

T = TypeVar("T")

_MOST_WAITING: Final = 64


class NotBegun(Exception):
    """The first item of a source did not come in time."""


class NotEnded(Exception):
    """A source went on for too long."""


class Pump(Generic[T]):
    """The items of all sources, with the number of each one's source, in the order in which they came. Each source
    has to begin within `first_s` and to end within `rest_s` from there."""

    def __init__(
        self, sources: Sequence[AsyncGenerator[T, None]], *, first_s: float | None = None, rest_s: float | None = None
    ) -> None:
        self._sources = sources
        self._first_s, self._rest_s = first_s, rest_s
        self._items: deque[tuple[int, T] | Exception] = deque()
        self._news, self._room = asyncio.Event(), asyncio.Event()
        self._tasks = [asyncio.ensure_future(self._read(index)) for index in range(len(sources))]

    async def take(self, *, within_s: float | None) -> list[tuple[int, T]]:
        """What has come, or nothing if nothing comes in time (None: wait on). Raises the first exception of any
        source, when what came before it has been taken."""
        if not self._items:
            self._news.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(within_s):
                    await self._news.wait()
        found: list[tuple[int, T]] = []
        while self._items:
            item = self._items[0]
            if isinstance(item, Exception):
                if found:
                    break
                raise item
            found.append(item)
            self._items.popleft()
        self._room.set()
        return found

    async def aclose(self) -> None:
        """Close all sources, also in the middle of a wait."""
        await end(*self._tasks)
        for source in self._sources:
            await source.aclose()

    async def _read(self, index: int) -> None:
        begun = False
        try:
            async with asyncio.timeout(self._first_s) as deadline:
                async for item in self._sources[index]:
                    if not begun:
                        begun = True
                        deadline.reschedule(self._end_s())
                    self._put((index, item))
                    while len(self._items) >= _MOST_WAITING:
                        self._room.clear()
                        await self._room.wait()
        except Exception as error:  # noqa: BLE001 - the consumer raises it, whatever it is
            self._put(self._overdue(begun=begun) if deadline.expired() else error)

    def _overdue(self, *, begun: bool) -> Exception:
        if begun:
            return NotEnded(f"The answer was not complete {self._rest_s:g} seconds after it had begun.")
        return NotBegun(f"The answer did not begin within {self._first_s:g} seconds; the server is too busy.")

    def _end_s(self) -> float | None:
        return None if self._rest_s is None else asyncio.get_running_loop().time() + self._rest_s

    def _put(self, item: "tuple[int, T] | Exception") -> None:
        self._items.append(item)
        self._news.set()


async def end(*tasks: "asyncio.Future[Any]") -> None:
    """Cancel and wait until they have cleaned up."""
    for task in tasks:
        task.cancel()
    with suppress(asyncio.CancelledError):
        if tasks:
            await asyncio.wait(tasks)
    for task in tasks:
        if task.done() and not task.cancelled():
            task.exception()  # seen; who waits for the task has raised it already
