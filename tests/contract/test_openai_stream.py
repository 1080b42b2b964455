"""Streamed answers: the order of events, keep-alives, hang-ups, and what happens when it goes wrong half-way."""

import asyncio
import json
from collections.abc import Coroutine
from typing import Any

import pytest

from odmoe_server.engine_api import GenerationFailed, NotReady, QueueFull
from support.http_app import DEADLINE_S, Wire, app_of, ask, asking, events, text_of
from support.scripted_engine import Gate, ScriptedEngine, words


def chunks(engine: ScriptedEngine, **fields: Any) -> list[Any]:
    return events(ask(engine, asking(stream=True, **fields)).content)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, DEADLINE_S))


def wire(engine: ScriptedEngine, *, stream: bool = True, keep_alive_s: float = 5.0) -> Wire:
    body = json.dumps(asking(stream=stream)).encode()
    return Wire(app_of(engine, keep_alive_s=keep_alive_s), body)


def test_events_in_their_order() -> None:
    answer = ask(ScriptedEngine.saying("Hi"), asking(stream=True))
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    *parts, done = events(answer.content)
    assert done == "[DONE]"
    assert len({(part["id"], part["created"], part["model"], part["system_fingerprint"]) for part in parts}) == 1
    assert {part["object"] for part in parts} == {"chat.completion.chunk"}
    choices = [part["choices"][0] for part in parts]
    assert [choice["delta"] for choice in choices] == [
        {"role": "assistant", "content": ""},
        {"content": "H"},
        {"content": "i"},
        {},
    ]
    assert [choice["finish_reason"] for choice in choices] == [None, None, None, "stop"]
    assert {choice["index"] for choice in choices} == {0}
    assert not any("usage" in part for part in parts)


def test_an_empty_answer_has_a_role_and_an_end() -> None:
    *parts, done = chunks(ScriptedEngine())
    assert done == "[DONE]"
    assert [part["choices"][0]["delta"] for part in parts] == [{"role": "assistant", "content": ""}, {}]


def test_usage_comes_last_and_only_when_asked() -> None:
    *parts, usage, done = chunks(ScriptedEngine.saying("Hi"), stream_options={"include_usage": True})
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 3
    assert usage["usage"]["total_tokens"] == usage["usage"]["prompt_tokens"] + 3
    assert not any("usage" in part for part in parts)


def test_nothing_of_a_stop_string_leaks() -> None:
    parts = chunks(ScriptedEngine.saying("one STAR STOP two"), stop="STOP")
    pieces = [p["choices"][0]["delta"].get("content") for p in parts if isinstance(p, dict) and p["choices"]]
    assert text_of(parts) == "one STAR "
    # While it could still become the stop string, it was held back.
    assert "STA" in pieces


def test_a_character_is_never_split() -> None:
    parts = chunks(ScriptedEngine.saying("a🏔b"))
    contents = [p["choices"][0]["delta"]["content"] for p in parts[1:-2]]
    assert contents == ["a", "🏔", "b"]


def test_an_event_is_one_line_whoever_cuts_it() -> None:
    text = "a\x85b\u2028c\u2029d\re\x0bf"
    answer = ask(ScriptedEngine.saying(text), asking(stream=True))
    assert text_of(events(answer.content)) == text
    assert all(line == "" or line.startswith("data: ") for line in answer.text.splitlines())


def test_headers_and_comments_come_while_the_engine_thinks() -> None:
    async def scenario() -> None:
        gate = Gate()
        client = wire(ScriptedEngine(script=[gate, *words("done")]), keep_alive_s=0.001)
        task = client.start()
        await client.until(b": keep-alive\n\n: keep-alive\n\n: keep-alive\n\n")
        assert client.status == 200
        assert b"data:" not in client.received
        gate.opened.set()
        await task
        assert client.complete
        assert text_of(events(client.received)) == "done"

    run(scenario())


def test_comments_come_between_tokens_too() -> None:
    async def scenario() -> None:
        gate = Gate()
        client = wire(ScriptedEngine(script=[*words("a"), gate, *words("b")]), keep_alive_s=0.001)
        task = client.start()
        await client.until(b'"a"')
        await client.until(b": keep-alive")
        gate.opened.set()
        await task
        assert text_of(events(client.received)) == "ab"

    run(scenario())


def test_tokens_are_sent_as_they_come() -> None:
    async def scenario() -> None:
        gate = Gate()
        client = wire(ScriptedEngine(script=[*words("first"), gate, *words(" second")]))
        task = client.start()
        await client.until(b'"t"')
        assert not client.complete
        gate.opened.set()
        await task

    run(scenario())


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("before", ["", "some text"])
def test_a_hang_up_closes_the_engines_generator(stream: bool, before: str) -> None:
    async def scenario() -> None:
        gate = Gate()
        engine = ScriptedEngine(script=[*words(before), gate, *words(" and much more")])
        client = wire(engine, stream=stream)
        task = client.start()
        await gate.reached.wait()
        assert engine.open_generators == 1
        client.hang_up()
        await task
        assert engine.open_generators == 0
        assert engine.tokens_said == len(before)

    run(scenario())


def test_a_hang_up_before_the_first_wait_is_noticed() -> None:
    async def scenario() -> None:
        gate = Gate()
        engine = ScriptedEngine(script=[gate])
        client = wire(engine)
        client.hang_up()
        await client.start()
        assert engine.open_generators == 0

    run(scenario())


@pytest.mark.parametrize("stream", [True, False])
def test_a_server_that_shuts_down_closes_the_generator_and_says_so(stream: bool) -> None:
    async def scenario() -> None:
        gate = Gate()
        engine = ScriptedEngine(script=[*words("begun"), gate])
        client = wire(engine, stream=stream)
        task = client.start()
        await gate.reached.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine.open_generators == 0
        last = events(client.received)[-1] if stream else json.loads(client.received)
        assert last["error"]["message"] == "The server is shutting down."
        assert client.status == (200 if stream else 503)
        assert client.complete

    run(scenario())


@pytest.mark.parametrize("error", [GenerationFailed("The cluster is gone."), NotReady("shutting down")])
def test_an_error_after_the_headers_is_an_event(error: Exception) -> None:
    engine = ScriptedEngine(script=[*words("Once"), error])
    answer = ask(engine, asking(stream=True))
    *parts, last = events(answer.content)
    assert answer.status_code == 200
    assert text_of(parts) == "Once"
    assert last["error"]["message"] == str(error)
    assert last["error"]["type"] == "server_error"
    assert set(last["error"]) == {"message", "type", "param", "code"}
    assert engine.open_generators == 0


def test_a_bug_after_the_headers_shows_no_insides() -> None:
    parts = chunks(ScriptedEngine(script=[*words("Once"), RuntimeError("secret of the engine")]))
    assert parts[-1]["error"]["code"] == "internal_error"
    assert "secret" not in json.dumps(parts)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (QueueFull("64 requests wait", retry_after_s=2.5), 429, "3"),
        (NotReady("no nodes"), 503, "5"),
        (GenerationFailed("lost"), 500, None),
        (RuntimeError("secret"), 500, None),
    ],
)
def test_an_error_before_the_first_token_has_its_status(
    stream: bool, error: Exception, status: int, retry_after: str | None
) -> None:
    engine = ScriptedEngine(script=[error])
    answer = ask(engine, asking(stream=stream))
    assert answer.status_code == status
    assert answer.headers.get("retry-after") == retry_after
    assert answer.json()["error"]["message"]
    assert "secret" not in answer.text
    assert "x-request-id" in answer.headers
    assert engine.open_generators == 0


def test_many_streams_do_not_mix() -> None:
    async def scenario() -> None:
        engine = ScriptedEngine.saying("the same for all, again and again")
        app = app_of(engine)
        clients = [Wire(app, json.dumps(asking(stream=True)).encode()) for _ in range(20)]
        await asyncio.gather(*(client.start() for client in clients))
        for client in clients:
            parts = events(client.received)
            assert text_of(parts) == "the same for all, again and again"
            assert len({part["id"] for part in parts if isinstance(part, dict)}) == 1
        ids = {events(client.received)[0]["id"] for client in clients}
        assert len(ids) == 20

    run(scenario())
