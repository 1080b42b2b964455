"""Links between roles with a weather of their own: TCP proxies that lose, repeat, delay or hold back whole messages.

One proxy for each pair of client and server, so that a fault befalls one link and no other. Knows no roles.
"""

import asyncio
import random
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic

from chaos.zmtp import Splitter

_READ_BYTES = 65_536
_HELD = 4096  # chunks under way in one direction; then the sender has to wait


@dataclass
class Weather:
    """What befalls the messages of a link, both ways. `cut`: connections end at once and no new ones are taken."""

    delay_s: float = 0.0
    drop: float = 0.0
    duplicate: float = 0.0
    cut: bool = False
    held: asyncio.Event = field(default_factory=asyncio.Event)  # set while nothing is held back
    dropped: int = 0
    repeated: int = 0

    def __post_init__(self) -> None:
        self.held.set()

    def clear(self) -> None:
        """Fair again."""
        self.delay_s = self.drop = self.duplicate = 0.0
        self.cut = False
        self.held.set()


class Proxy:
    """Forwards connections of one client to one server; `port` is where it listens."""

    port: int

    def __init__(self, target_port: int, *, dice: random.Random) -> None:
        self.weather = Weather()
        self._target_port = target_port
        self._dice = dice
        self._writers: set[asyncio.StreamWriter] = set()
        self._connections: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen on a free port of this machine."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """End every connection and listen no more."""
        if self._server is not None:
            self._server.close()
        self.cut_all()
        await asyncio.gather(*self._connections)

    def cut_all(self) -> None:
        """End every connection as a reset does."""
        for writer in list(self._writers):
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._connect(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.weather.cut:
            writer.transport.abort()
            return
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, far_writer}
        ways = [self._pump(reader, far_writer), self._pump(far_reader, writer)]
        await _first_to_end(ways)
        for one in (writer, far_writer):
            one.transport.abort()
        self._writers -= {writer, far_writer}

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One direction, in order, each chunk at its time."""
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_HELD)
        await _first_to_end([self._receive(reader, under_way), self._send(under_way, writer)])

    async def _receive(self, reader: asyncio.StreamReader, under_way: "asyncio.Queue[tuple[float, bytes]]") -> None:
        splitter, weather = Splitter(), self.weather
        while data := await reader.read(_READ_BYTES):
            for chunk in splitter.feed(data):
                copies = 1
                if chunk.is_message and self._dice.random() < weather.drop:
                    copies = 0
                    weather.dropped += 1
                elif chunk.is_message and self._dice.random() < weather.duplicate:
                    copies = 2
                    weather.repeated += 1
                for _ in range(copies):
                    await under_way.put((monotonic() + weather.delay_s, chunk.data))

    async def _send(self, under_way: "asyncio.Queue[tuple[float, bytes]]", writer: asyncio.StreamWriter) -> None:
        while True:
            due_s, data = await under_way.get()
            if (wait_s := due_s - monotonic()) > 0:
                await asyncio.sleep(wait_s)
            await self.weather.held.wait()
            writer.write(data)
            await writer.drain()


async def _first_to_end(works: "Iterable[asyncio._CoroutineLike[None]]") -> None:
    """Run them side by side until one ends or its connection breaks; the others end with it."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(OSError, asyncio.CancelledError):
                await task
