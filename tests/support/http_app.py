"""The HTTP application around a scripted engine, and clients for it that need no socket."""

import asyncio
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import httpx
from fastapi import FastAPI

from odmoe_server.app import create_app
from odmoe_server.catalog import Catalog
from odmoe_server.engine_api import Sampling
from odmoe_server.text import TextCodec
from support.scripted_engine import ScriptedEngine, tiny_tokenizer

MODEL = "test/tiny"
ALIAS = "tiny"
DEADLINE_S = 10.0
CHAT = "/v1/chat/completions"


def app_of(engine: ScriptedEngine, **options: Any) -> FastAPI:
    """An application that serves `engine` under two names."""
    catalog = Catalog(
        names=(MODEL, ALIAS),
        created=1_700_000_000,
        context_length=engine.context_length,
        fingerprint="odmoe_0123456789ab",
        sampling=Sampling(temperature=0.5, top_p=0.9),
    )
    return create_app(engine=engine, text=TextCodec(tiny_tokenizer()), catalog=catalog, **options)


def asking(text: str = "Hello", **fields: Any) -> dict[str, Any]:
    """A chat request."""
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], **fields}


def request(app: FastAPI, method: str, path: str, **options: Any) -> httpx.Response:
    """One request, its answer whole."""

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await asyncio.wait_for(client.request(method, path, **options), DEADLINE_S)

    return asyncio.run(send())


def ask(engine: ScriptedEngine, body: Any = None, **options: Any) -> httpx.Response:
    """POST a chat request to a fresh application around the engine."""
    return request(app_of(engine, **options), "POST", CHAT, json=asking() if body is None else body)


def events(body: bytes) -> list[Any]:
    """The data of a stream's events; [DONE] and comments as text."""
    parsed: list[Any] = []
    blocks = body.decode().split("\n\n")
    assert blocks.pop() == "", "a stream ends with the end of an event"
    for block in blocks:
        payload = block.removeprefix("data: ")
        parsed.append(payload if payload == "[DONE]" or block.startswith(":") else json.loads(payload))
    return parsed


def text_of(parts: Iterable[Any]) -> str:
    """The text of a stream's events."""
    chunks = (part for part in parts if isinstance(part, dict))
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


@dataclass
class Wire:
    """One request by hand, as a server speaks ASGI: what was sent when can be looked at, and the client can hang up."""

    app: FastAPI
    body: bytes
    path: str = CHAT
    headers: dict[str, str] = field(default_factory=lambda: {"content-type": "application/json"})
    status: int | None = None
    received: bytes = b""
    complete: bool = False

    def __post_init__(self) -> None:
        self._to_app: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._news = asyncio.Condition()

    def start(self) -> "asyncio.Task[None]":
        """Send the request."""
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": self.path,
            "raw_path": self.path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(name.encode(), value.encode()) for name, value in self.headers.items()],
            "client": ("127.0.0.1", 1234),
            "server": ("127.0.0.1", 8000),
        }
        self._to_app.put_nowait({"type": "http.request", "body": self.body, "more_body": False})
        return asyncio.ensure_future(self.app(scope, self._to_app.get, self._send))

    def hang_up(self) -> None:
        """The client goes."""
        self._to_app.put_nowait({"type": "http.disconnect"})

    async def until(self, part: bytes) -> None:
        """Wait until this has been received."""
        async with self._news:
            await asyncio.wait_for(self._news.wait_for(lambda: part in self.received), DEADLINE_S)

    async def _send(self, message: Any) -> None:
        async with self._news:
            if message["type"] == "http.response.start":
                self.status = message["status"]
            else:
                self.received += message["body"]
                self.complete = not message.get("more_body", False)
            self._news.notify_all()
