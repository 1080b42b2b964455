"""Two hundred clients that go away half-way: the server still answers at once, and nothing of theirs is left."""

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from odmoe_server.engine_api import Finished, GenerationRequest, Token
from support.abandoning import aborted_total, ask_and_leave, crowd
from support.http_app import MODEL, asking
from support.http_served import running, until
from support.scripted_engine import ScriptedEngine, words

# Alone: it is an answer's time that is looked at.
pytestmark = [pytest.mark.slow, pytest.mark.alone]
NUM_CLIENTS = 200
AT_ONCE_S = 1.0
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", asking()),
    ("/v1/chat/completions", asking(n=2, tools=[TOOL])),
    ("/v1/completions", {"model": MODEL, "prompt": ["a", "b"], "max_tokens": 10_000}),
    ("/v1/responses", {"model": MODEL, "input": "x"}),
    ("/v1/messages", {"model": MODEL, "max_tokens": 10_000, "messages": [{"role": "user", "content": "x"}]}),
]


@dataclass
class EndlessEngine(ScriptedEngine):
    """Says something every few milliseconds until nobody listens any more, but to a short request a short answer."""

    context_length: int = 1_000_000

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Token | Finished, None]:
        """See Engine."""
        self.open_generators += 1
        try:
            for said in range(request.max_tokens):
                self.tokens_said += 1
                yield Token(words("abcdefgh ")[said % 9])
                await asyncio.sleep(0.005)
            yield self._finished(request, request.max_tokens, reason="length")
        finally:
            self.open_generators -= 1


async def abandon(url: str, number: int) -> None:
    """Ask, wait a little or for the first bytes, and hang up."""
    path, body = REQUESTS[number % len(REQUESTS)]
    stream = number % 2 == 0

    async def wait(reader: asyncio.StreamReader) -> None:
        if stream:
            assert b"200 OK" in await reader.read(500)
        else:
            await asyncio.sleep(0.02 * (number % 7))

    await ask_and_leave(url, path, {**body, "stream": stream}, wait=wait, by_reset=number % 3 == 0)


def test_nothing_is_left_of_clients_that_went_away() -> None:
    engine = EndlessEngine()
    with running(engine) as server:
        crowd(lambda number: abandon(server.url, number), number=NUM_CLIENTS)
        begun_s = time.monotonic()
        for method, path, body in (
            ("GET", "/health", None),
            ("POST", "/v1/chat/completions", asking(max_tokens=5)),
            ("POST", "/v1/messages", {**REQUESTS[4][1], "max_tokens": 5}),
        ):
            assert httpx.request(method, server.url + path, json=body, timeout=AT_ONCE_S).status_code == 200
        assert time.monotonic() - begun_s < AT_ONCE_S
        until(lambda: engine.open_generators == 0)
        said = engine.tokens_said
        time.sleep(0.05)
        assert engine.tokens_said == said
        page = httpx.get(f"{server.url}/metrics", timeout=AT_ONCE_S).text
    assert aborted_total(page) >= NUM_CLIENTS / 2
