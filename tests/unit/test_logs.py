"""Log lines: one JSON object each, with the request's id, and nothing of what is said in the request."""

import asyncio
import io
import json
import logging
from typing import Any

import pytest

from odmoe_wire import logs
from support.http_app import CHAT, app_of, asking, request
from support.scripted_engine import ScriptedEngine


def lines_of(work: Any) -> list[dict[str, Any]]:
    """What is logged meanwhile, as JSON."""
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(logs.JsonLines("server"))
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        work()
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
    return [json.loads(line) for line in written.getvalue().splitlines()]


def test_a_line_is_one_object_whatever_is_in_it() -> None:
    (line,) = lines_of(lambda: logging.getLogger("a.b").warning("two\nlines: %s", '"quoted"'))
    assert line.pop("time").endswith("+00:00")
    assert line == {"level": "warning", "role": "server", "logger": "a.b", "message": 'two\nlines: "quoted"'}


def test_an_exception_comes_with_its_trace() -> None:
    def fail() -> None:
        try:
            raise KeyError("lost")
        except KeyError:
            logging.getLogger("a").exception("it failed")

    (line,) = lines_of(fail)
    assert line["message"] == "it failed"
    assert "KeyError: 'lost'" in line["exception"]


def test_an_answers_line_has_fields_and_ids_but_no_text() -> None:
    app = app_of(ScriptedEngine.saying("hidden answer"))
    found = lines_of(
        lambda: request(app, "POST", f"{CHAT}?x=hidden", json=asking("hidden"), headers={"x-request-id": "seen"})
    )
    (line,) = [line for line in found if line["logger"] == "odmoe_server.access"]
    assert (line["method"], line["path"], line["status"], line["request_id"]) == ("POST", CHAT, 200, "seen")
    assert line["answer_id"].startswith("chatcmpl-")
    assert line["took_s"] >= 0
    assert not any("hidden" in json.dumps(line) for line in found if line["logger"].startswith("odmoe"))


def test_lines_of_requests_side_by_side_keep_their_ids() -> None:
    async def one(name: str) -> None:
        logs.request_id.set(name)
        await asyncio.sleep(0)
        logging.getLogger("side").info("by %s", name)

    async def both() -> None:
        await asyncio.gather(one("first"), one("second"))

    found = [line for line in lines_of(lambda: asyncio.run(both())) if line["logger"] == "side"]
    assert {line["message"]: line["request_id"] for line in found} == {"by first": "first", "by second": "second"}


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_each_format_is_set_up(log_format: logs.LogFormat, capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    for handler in before:
        root.removeHandler(handler)
    try:
        logs.configure("info", log_format, role="node-3")
        logging.getLogger("a").info("said")
    finally:
        for handler in list(root.handlers):
            root.removeHandler(handler)
        for handler in before:
            root.addHandler(handler)
        root.setLevel(level)
    (line,) = capsys.readouterr().err.splitlines()
    if log_format == "json":
        assert json.loads(line)["role"] == "node-3"
    else:
        assert line.endswith("INFO    a: said")
