"""A real uvicorn around the application, on a free port and a thread of its own."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from odmoe_server import listening
from odmoe_server.config import ServeSettings
from odmoe_server.serving import uvicorn_config
from support.http_app import app_of
from support.scripted_engine import Gate, ScriptedEngine

DEADLINE_S = 20.0


class Served:
    """A server on a free port, on a thread of its own."""

    def __init__(self, app: FastAPI) -> None:
        self._listener = listening.bind("127.0.0.1", 0)
        self.server = uvicorn.Server(uvicorn_config(app, ServeSettings(drain_s=5)))
        self.url = listening.url(self._listener)
        self._loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self.server.serve(sockets=[self._listener]))

    def open(self, gate: Gate) -> None:
        """Let the script go on."""
        self._loop.call_soon_threadsafe(gate.opened.set)


@contextmanager
def running(engine: ScriptedEngine, **options: object) -> Iterator[Served]:
    """A server around a scripted engine."""
    with running_app(app_of(engine, **options)) as served:
        yield served


@contextmanager
def running_app(app: FastAPI) -> Iterator[Served]:
    """A server that runs, and ends in bounded time."""
    served = Served(app)
    served.thread.start()
    try:
        until(lambda: served.server.started)
        yield served
    finally:
        served.server.should_exit = True
        served.thread.join(DEADLINE_S)
        assert not served.thread.is_alive()


def until(condition: Callable[[], bool]) -> None:
    """Wait for it, but not for ever."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.01)
