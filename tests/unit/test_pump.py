"""Several generators read side by side: order, patience, failures, deadlines, and what is left open (nothing)."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from typing import Any

import pytest

from odmoe_server.pump import NotBegun, NotEnded, Pump

DEADLINE_S = 10.0


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, DEADLINE_S))


class Source:
    """Gives what it was told to; None waits for ever, an exception is raised."""

    def __init__(self, *items: object) -> None:
        self.items = items
        self.taken = 0
        self.closed = False

    async def read(self) -> AsyncGenerator[object, None]:
        """All of it."""
        try:
            for item in self.items:
                if item is None:
                    await asyncio.Event().wait()
                if isinstance(item, Exception):
                    raise item
                self.taken += 1
                yield item
        finally:
            self.closed = True


async def drain(pump: Pump[object]) -> None:
    """Take all there is, for ever."""
    while True:
        await pump.take(within_s=None)


def test_items_come_with_their_sources_number() -> None:
    async def scenario() -> None:
        pump = Pump([Source("a", "b").read(), Source("c", None).read()])
        found: list[tuple[int, object]] = []
        while len(found) < 3:
            found += await pump.take(within_s=None)
        assert [item for index, item in found if index == 0] == ["a", "b"]
        assert [item for index, item in found if index == 1] == ["c"]
        assert await pump.take(within_s=0.001) == []
        await pump.aclose()

    run(scenario())


def test_a_failure_comes_behind_what_was_there_and_stays() -> None:
    async def scenario() -> None:
        pump = Pump([Source("a", ValueError("lost")).read()])
        assert await pump.take(within_s=None) == [(0, "a")]
        for _ in range(2):
            with pytest.raises(ValueError, match="lost"):
                await pump.take(within_s=None)
        await pump.aclose()

    run(scenario())


def test_a_slow_consumer_bounds_what_waits_and_loses_nothing() -> None:
    async def scenario() -> None:
        source = Source(*range(1000), None)
        pump = Pump([source.read()])
        found = await pump.take(within_s=None)
        for _ in range(100):
            await asyncio.sleep(0)
        assert source.taken <= len(found) + 64
        while len(found) < 1000:
            found += await pump.take(within_s=None)
        assert [item for _, item in found] == list(range(1000))
        await pump.aclose()

    run(scenario())


@pytest.mark.parametrize("items", [(None,), ("a", None), tuple(range(1000))])
def test_closing_closes_the_sources_wherever_they_are(items: tuple[object, ...]) -> None:
    async def scenario() -> None:
        sources = [Source(*items), Source(*items)]
        pump = Pump([source.read() for source in sources])
        await pump.take(within_s=0.001)
        await pump.aclose()
        assert all(source.closed for source in sources)

    run(scenario())


@pytest.mark.parametrize(
    ("items", "kind"), [((None,), NotBegun), (("a", None), NotEnded), ((*range(1000), None), NotEnded)]
)
def test_a_source_that_takes_too_long(items: tuple[object, ...], kind: type[Exception]) -> None:
    async def scenario() -> None:
        source = Source(*items)
        pump = Pump([source.read()], first_s=0.01, rest_s=0.02)
        with pytest.raises(kind):
            await drain(pump)
        await pump.aclose()
        assert source.closed

    run(scenario())


def test_a_sources_own_timeout_is_not_ours() -> None:
    async def scenario() -> None:
        pump = Pump([Source("a", TimeoutError("its own")).read()], first_s=5, rest_s=5)
        await pump.take(within_s=None)
        with pytest.raises(TimeoutError, match="its own"):
            await pump.take(within_s=None)
        await pump.aclose()

    run(scenario())
