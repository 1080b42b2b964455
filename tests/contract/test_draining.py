"""SIGTERM as clients see it: what was admitted is finished, what comes now gets a 503 with Retry-After."""

import asyncio
import signal
from collections.abc import MutableMapping
from typing import Any

import pytest
import uvicorn

from odmoe_server.draining import Drain, DrainingServer

Scope = MutableMapping[str, Any]


class Clock:
    """Seconds that pass when told to."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Rig:
    """An application whose POSTs wait at a gate, behind a drain."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.clock = Clock()
        self.drain = Drain(self._answer, drain_s=10.0, clock=self.clock)

    async def _answer(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["method"] == "POST":
            await self.gate.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def ask(self, method: str, path: str) -> tuple[int, dict[bytes, bytes]]:
        sent: list[Scope] = []

        async def send(message: Scope) -> None:
            sent.append(message)

        async def receive() -> Scope:
            raise AssertionError("nobody reads")

        await self.drain({"type": "http", "method": method, "path": path}, receive, send)
        return sent[0]["status"], dict(sent[0]["headers"])


def test_what_was_admitted_is_finished_and_what_comes_now_is_refused() -> None:
    async def run() -> None:
        rig = Rig()
        first = asyncio.create_task(rig.ask("POST", "/v1/chat/completions"))
        await asyncio.sleep(0)
        assert not rig.drain.is_over
        assert rig.drain.begin()
        assert not rig.drain.begin(), "once"
        status, headers = await rig.ask("POST", "/v1/chat/completions")
        assert (status, headers[b"retry-after"]) == (503, b"5")
        assert (await rig.ask("GET", "/health"))[0] == 503, "a load balancer looks there"
        assert (await rig.ask("GET", "/health/ready"))[0] == 503, "and there"
        assert (await rig.ask("GET", "/health/live"))[0] == 200, "it is not to be killed for leaving"
        assert (await rig.ask("GET", "/metrics"))[0] == 200
        assert not rig.drain.is_over, "one is under way"
        rig.gate.set()
        assert (await first)[0] == 200
        assert rig.drain.is_over

    asyncio.run(run())


def test_the_wait_is_bounded_and_with_nothing_in_hand_there_is_none() -> None:
    async def run() -> None:
        rig = Rig()
        waiting = asyncio.create_task(rig.ask("POST", "/v1/chat/completions"))
        await asyncio.sleep(0)
        rig.drain.begin()
        rig.clock.now_s = 9.9
        assert not rig.drain.is_over
        rig.clock.now_s = 10.0
        assert rig.drain.is_over
        waiting.cancel()
        idle = Rig()
        idle.drain.begin()
        assert idle.drain.is_over

    asyncio.run(run())


@pytest.mark.parametrize("again", [False, True])
def test_the_first_signal_drains_and_the_second_ends(again: bool) -> None:
    async def run() -> None:
        rig = Rig()
        server = DrainingServer(uvicorn.Config(rig.drain, timeout_graceful_shutdown=99), drain=rig.drain)
        waiting = asyncio.create_task(rig.ask("POST", "/v1/completions"))
        await asyncio.sleep(0)
        server.handle_exit(signal.SIGTERM, None)
        assert not server.should_exit
        if again:
            server.handle_exit(signal.SIGTERM, None)
        else:
            assert not await server.on_tick(1)
            rig.gate.set()
            await waiting
            assert await server.on_tick(2)
        assert server.should_exit
        waiting.cancel()

    asyncio.run(run())
