"""The clients of the serving benchmark against a real server: what they count is what was said."""

import asyncio

import pytest

from odmoe_server.bench import serve_front, serve_load
from odmoe_server.bench.serve_engines import InstantEngine
from odmoe_server.bench.serve_load import Asked
from support.http_app import app_of
from support.http_served import running_app
from support.scripted_engine import words

pytestmark = pytest.mark.slow
ENGINE = InstantEngine(words("Hi there. "), context_length=4096, paced=True)


def test_the_sdk_counts_every_token() -> None:
    async def ask(url: str) -> list[serve_load.Told]:
        async with serve_load.client(url) as sdk:
            load = [[Asked(content="x", tokens=20)] * 2] * 3
            return await serve_load.steady(sdk, load, model="tiny")

    with running_app(app_of(ENGINE)) as server:  # type: ignore[arg-type]
        told = asyncio.run(ask(server.url))
    assert [(answer.tokens, len(answer.came_s)) for answer in told] == [(20, 20)] * 6
    found = serve_load.summary(told)
    assert found["output_tokens"] == 120
    assert found["itl_ms_p50"] >= 0


def test_a_request_joins_streams_that_run() -> None:
    async def join(url: str) -> serve_load.Disturbed:
        async with serve_load.client(url) as sdk:
            running = [Asked(content="x", tokens=400)] * 2
            return await serve_load.disturbed(sdk, running, Asked(content="y", tokens=1), model="tiny")

    with running_app(app_of(ENGINE)) as server:  # type: ignore[arg-type]
        found = asyncio.run(join(server.url))
    assert found.joined.tokens == 1
    assert all(gap >= 0 for gap in found.before_s + found.during_s)


def test_the_front_end_is_measured_alone() -> None:
    with running_app(app_of(ENGINE)) as server:  # type: ignore[arg-type]
        rows = serve_front.measure(server.url, variant="front", streams=(1, 2), tokens=300, model="tiny")
    assert [row["streams"] for row in rows] == [1, 2]
    # Each token, the role and the end of each stream.
    assert [row["chunks"] for row in rows] == [302, 604]
    assert all(row["chunks_per_core_s"] > 0 for row in rows)
