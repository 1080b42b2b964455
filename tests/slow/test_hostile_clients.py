"""Clients that send no request, and more of them than the server has file descriptors: others are served on."""

import asyncio
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from chaos import roles
from chaos.cluster import free_port
from odmoe_server.slow_clients import HastyProtocol
from support.serve_process import chat_store

SPARE = 12
CROWD = 60


class HastierProtocol(HastyProtocol):
    """So that the test need not wait."""

    head_s = 0.3


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await asyncio.sleep(0.6)  # longer than a head may take
    await send({"type": "http.response.body", "body": b"ok"})


def test_a_client_that_does_not_get_to_the_point_is_let_go_and_a_slow_answer_is_not() -> None:
    async def closed_after_s(port: int, said: bytes) -> float:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(said)
        began_s = time.monotonic()
        async with asyncio.timeout(20):
            assert await reader.read() == b""
        writer.close()
        return time.monotonic() - began_s

    async def run() -> None:
        config = uvicorn.Config(app, port=0, http=HastierProtocol, lifespan="off", log_config=None)
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        took_s = await asyncio.gather(
            closed_after_s(port, b""), closed_after_s(port, b"GET / HTTP/1.1\r\nhost: x\r\nx-")
        )
        assert min(took_s) >= 0.25
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            for _ in range(2):  # the second on the same connection
                assert (await client.get("/")).text == "ok"
        server.should_exit = True
        await serving

    asyncio.run(run())


@pytest.fixture
def crowded(tmp_path: Path) -> Iterator[tuple[roles.Process, str]]:
    """A server that has few file descriptors to spare, and where it is."""
    roles.begin()
    processes, port = roles.Processes(), free_port()
    options = {"model": chat_store(tmp_path), "port": port, "endpoint": f"ipc://{tmp_path}/s"}
    server = processes.add("server", "server", options, log=tmp_path / "log")
    server.start()
    url = f"http://127.0.0.1:{port}"
    try:
        _until_it_answers(url, server, timeout_s=180)
        in_use = len(list(Path(f"/proc/{server.pid}/fd").iterdir()))
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (in_use + SPARE, in_use + SPARE))
        yield server, url
    finally:
        processes.kill_all()


def _until_it_answers(url: str, server: roles.Process, *, timeout_s: float) -> None:
    until_s = time.monotonic() + timeout_s
    while True:
        try:
            httpx.get(f"{url}/health", timeout=2, trust_env=False)
            return
        except httpx.TransportError:
            assert server.exit_code is None, server.log.read_text()
            assert time.monotonic() < until_s, server.log.read_text()
            time.sleep(0.1)


@pytest.mark.slow
def test_more_clients_than_file_descriptors(crowded: tuple[roles.Process, str]) -> None:
    server, url = crowded
    address = ("127.0.0.1", int(url.rpartition(":")[2]))
    with ExitStack() as crowd, httpx.Client(base_url=url, timeout=10, trust_env=False) as early:
        assert early.get("/metrics").status_code == 200
        for _ in range(CROWD):
            crowd.enter_context(socket.create_connection(address, timeout=10))
        for _ in range(3):
            assert early.get("/metrics").status_code == 200, "who was there before is served on"
        assert server.is_alive
    _until_it_answers(url, server, timeout_s=60)
