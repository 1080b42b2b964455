"""GET / and its feed: over HTTP, in the terminal, and in a real browser where Debian's chromium is installed."""

import asyncio
import os
import re
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import uvicorn
from rich.console import Console

from odmoe_server.status import terminal
from odmoe_server.status.feed import Status
from odmoe_server.status.routes import MAX_WATCHERS, content_security_policy
from support.http_app import DEADLINE_S, app_of, request
from support.scripted_engine import READY, ScriptedEngine

KEY = "first-key"
FEED = "/status/events"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium (Debian's package) here")


@contextmanager
def serving(engine: ScriptedEngine, **options: Any) -> Iterator[str]:
    """The application behind a real socket; its address."""
    leaving = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        app = app_of(engine, is_leaving=leaving.is_set, **options)
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", timeout_graceful_shutdown=5))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            leaving.set()
            server.should_exit = True
            thread.join(DEADLINE_S)
            assert not thread.is_alive()


def pictures(url: str, count: int, **headers: str) -> list[Status]:
    found: list[Status] = []
    with httpx.stream("GET", url + FEED, headers=headers, timeout=DEADLINE_S) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line:
                found.append(msgspec.json.decode(line.removeprefix("data: "), type=Status))
            if len(found) == count:
                break
    return found


def test_the_page_needs_no_key_and_tells_nothing() -> None:
    answer = request(app_of(ScriptedEngine(), api_keys=(KEY,)), "GET", "/")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    for word in ("node-0", "test/tiny", KEY):
        assert word not in answer.text


def test_the_page_fetches_nothing_from_elsewhere() -> None:
    answer = request(app_of(ScriptedEngine()), "GET", "/")
    addresses = set(re.findall(r"https?://[^\s\"'`)]+", answer.text))
    assert addresses <= {"http://www.w3.org/2000/svg"}, "names of formats are no addresses"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe-inline" not in policy
    assert policy == content_security_policy(answer.text)


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer wrong"}])
def test_the_feed_wants_the_key(headers: dict[str, str]) -> None:
    answer = request(app_of(ScriptedEngine(), api_keys=(KEY,)), "GET", FEED, headers=headers)
    assert answer.status_code == 401


def test_the_feed_follows_the_engine_and_ends_with_the_server() -> None:
    engine = ScriptedEngine()
    with serving(engine, api_keys=(KEY,)) as url:
        first, second = pictures(url, 2, authorization=f"Bearer {KEY}")
        assert (first.state, first.model, [node.id for node in first.nodes]) == (
            "ready",
            "test/tiny",
            ["node-0", "predictor"],
        )
        assert second.generation_tokens == 22
        engine.unready("waiting", "waiting for a node")
        (third,) = pictures(url, 1, authorization=f"Bearer {KEY}")
        assert (third.state, third.detail) == ("waiting", "waiting for a node")


def test_too_many_watchers_are_refused_and_those_that_leave_make_room() -> None:
    async def crowd() -> None:
        app = app_of(ScriptedEngine())
        ends: list[asyncio.Queue[Any]] = []
        tasks = []
        statuses: list[int] = []

        async def watch(until: asyncio.Queue[Any]) -> None:
            async def send(message: Any) -> None:
                if message["type"] == "http.response.start":
                    statuses.append(message["status"])

            scope = {
                "type": "http",
                "method": "GET",
                "path": FEED,
                "raw_path": FEED.encode(),
                "root_path": "",
                "query_string": b"",
                "headers": [],
                "scheme": "http",
                "server": ("127.0.0.1", 80),
                "client": ("127.0.0.1", 1),
            }
            await app(scope, until.get, send)

        for _ in range(MAX_WATCHERS + 1):
            ends.append(asyncio.Queue())
            tasks.append(asyncio.ensure_future(watch(ends[-1])))
            await asyncio.sleep(0)
        while len(statuses) <= MAX_WATCHERS:
            await asyncio.sleep(0.01)
        assert sorted(statuses) == [200] * MAX_WATCHERS + [429]
        for end in ends:
            end.put_nowait({"type": "http.disconnect"})
        await asyncio.wait_for(asyncio.gather(*tasks), DEADLINE_S)
        statuses.clear()
        again: asyncio.Queue[Any] = asyncio.Queue()
        again.put_nowait({"type": "http.disconnect"})
        await asyncio.wait_for(watch(again), DEADLINE_S)
        assert statuses in ([200], [])

    asyncio.run(crowd())


def test_the_terminal_command_against_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(ScriptedEngine(), api_keys=(KEY,)) as url:
        terminal.show(url, api_key=KEY, once=True, as_json=False, console=Console(width=120))
        assert "node-0" in capsys.readouterr().out
        terminal.show(url, api_key=KEY, once=False, as_json=False, console=Console(width=120))
        assert "node-0" in capsys.readouterr().out, "no terminal: one picture, and an end"
        terminal.show(url, api_key=KEY, once=False, as_json=True, console=Console(width=120))
        assert msgspec.json.decode(capsys.readouterr().out.encode(), type=Status).model == "test/tiny"
        with pytest.raises(terminal.StatusError, match="wants another API key"):
            terminal.show(url, api_key="wrong", once=True, as_json=False, console=Console())
        with pytest.raises(terminal.StatusError, match="is it an odmoe server"):
            terminal.show(f"{url}/v1", api_key=KEY, once=True, as_json=False, console=Console())


@in_a_browser
def test_in_a_browser_it_asks_for_the_key_shows_the_nodes_and_follows_them(tmp_path: Path) -> None:
    """On a phone's screen. ODMOE_SCREENSHOTS names a folder to keep the pictures in."""
    from playwright.sync_api import expect, sync_playwright

    folder = Path(os.environ.get("ODMOE_SCREENSHOTS", tmp_path))
    engine = ScriptedEngine()
    with serving(engine, api_keys=(KEY,)) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 844})
        expect.set_options(timeout=DEADLINE_S * 1000)
        asked: list[str] = []
        problems: list[str] = []
        page.on("request", lambda sent: asked.append(sent.url))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda said: problems.append(said.text) if "Content Security" in said.text else None)

        page.goto(url)
        expect(page.locator("#ask")).to_be_visible()
        page.fill("#key", "wrong")
        page.click("text=Show")
        expect(page.locator("#why")).to_contain_text("not accepted")
        page.fill("#key", KEY)
        page.click("text=Show")
        node = page.locator("[data-node=node-0]")
        expect(node.locator(".slots i.full")).to_have_count(1)
        expect(node.locator(".slots i")).to_have_count(4)
        expect(page.locator("[data-name='forecast recall'] .figure")).to_contain_text("90")
        expect(page.locator("#word")).to_have_text("ready")
        page.screenshot(path=folder / "phone.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, "nothing sticks out"

        used = replace(READY.nodes[0], used_slots=3)
        engine.state = replace(engine.state, nodes=(used, replace(READY.nodes[1], alive=False)), predictor_alive=False)
        expect(node.locator(".slots i.full")).to_have_count(3)
        expect(page.locator("[data-node=predictor].gone")).to_have_count(1)
        page.set_viewport_size({"width": 1200, "height": 800})
        page.screenshot(path=folder / "desk.png", full_page=True)
        page.reload()
        expect(node).to_be_visible()
        browser.close()
    assert not problems
    assert {address.split("/")[2] for address in asked if address.startswith("http")} == {url.split("/")[2]}
