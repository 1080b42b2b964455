"""Whatever is sent to any address: an answer, no 5xx, and errors in the shape that its clients know.

Requests are made from the OpenAPI document by schemathesis, and by hand for what no document describes. A short form of
`make fuzz`, which makes more of them: ODMOE_FUZZ_EXAMPLES for each address, valid and invalid ones.
"""

import asyncio
import json
import os
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.generation import GenerationMode
from schemathesis.generation.case import Case

from support.http_app import MODEL, app_of, asking
from support.scripted_engine import ScriptedEngine

NUM_EXAMPLES = int(os.environ.get("ODMOE_FUZZ_EXAMPLES", "5"))
DEADLINE_S = 20.0
APP = app_of(ScriptedEngine.saying("Hello 🏔.", context_length=2048))
DOCUMENT = APP.openapi()
SCHEMA = schemathesis.openapi.from_dict(DOCUMENT)
OPERATIONS = {operation.ok().label: operation.ok() for operation in SCHEMA.get_all_operations()}
TAKING_BODIES = [path for path, verbs in DOCUMENT["paths"].items() if "requestBody" in verbs.get("post", {})]


class Door:
    """The application, and a client that waits for nothing longer than it should."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner()
        transport = httpx.ASGITransport(APP, raise_app_exceptions=False)
        self._client = httpx.AsyncClient(transport=transport, base_url="http://test")

    def send(self, request: httpx.Request) -> httpx.Response:
        """The answer, whole; fails if there is none in time."""

        async def ask() -> httpx.Response:
            return await asyncio.wait_for(self._client.send(request), DEADLINE_S)

        return self._runner.run(ask())

    def close(self) -> None:
        """The end."""
        self._runner.run(self._client.aclose())
        self._runner.close()


@pytest.fixture(scope="module")
def door() -> Iterator[Door]:
    door = Door()
    yield door
    door.close()


def check(answer: httpx.Response) -> None:
    """What holds of every answer."""
    assert answer.status_code < 500, answer.text
    assert "x-request-id" in answer.headers
    if answer.status_code >= 400:
        body = answer.json()
        assert set(body) <= {"error", "type", "request_id"}, body
        assert body["error"]["message"]
        assert body["error"]["type"]


def sent(case: Case) -> httpx.Request:
    """A case as it goes over the wire."""
    wanted = case.as_transport_kwargs(base_url="http://test")
    names = ("method", "url", "headers", "params", "data", "json", "cookies", "files")
    made = requests.Request(**{name: wanted[name] for name in names if name in wanted}).prepare()
    assert made.url is not None
    content = made.body.encode() if isinstance(made.body, str) else made.body
    headers = {name: value for name, value in made.headers.items() if name.lower() != "content-length"}
    return httpx.Request(str(made.method), made.url, headers=headers, content=content)


@pytest.mark.parametrize(
    ("label", "mode"),
    [
        *((label, GenerationMode.POSITIVE) for label in sorted(OPERATIONS)),
        # Of what takes no body nothing can be wrong.
        *((label, GenerationMode.NEGATIVE) for label, operation in sorted(OPERATIONS.items()) if operation.body),
    ],
)
def test_whatever_the_document_allows_or_forbids(door: Door, label: str, mode: GenerationMode) -> None:
    operation = OPERATIONS[label]

    @settings(
        max_examples=NUM_EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def each(case: Case) -> None:
        check(door.send(sent(case)))

    each()


MALFORMED: dict[str, bytes] = {
    "nothing": b"",
    "null": b"null",
    "list": b"[]",
    "number": b"1",
    "text": b'"hello"',
    "half": b'{"model": "x"',
    "no text": b"\xff\xfe\x00{}",
    "form": b"model=x&messages=y",
    "nested lists": b"[" * 100_000,
    "nested objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "nested in a field": b'{"model":"x","metadata":' + b'{"a":' * 5_000 + b"1" + b"}" * 5_001,
    "not a number": b'{"model":"x","temperature":NaN}',
    "too much": b'{"model":"x","temperature":1e999}',
    "many digits": b'{"model":"x","seed":' + b"9" * 10_000 + b"}",
    "half a character": b'{"model":"\\ud800"}',
    "bytes behind": b"{} {}",
    "a long name": b'{"' + b"a" * 100_000 + b'":1}',
}
# What must not break anything where it takes the place of a sound value.
ODD: list[Any] = [None, True, -1, 2**70, 1.5, "", "\x00", "\ud83c", "x" * 50_000, [], [None], [[]], {}, {"": None}]


@pytest.mark.parametrize("path", TAKING_BODIES)
@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_body_is_the_clients_mistake(door: Door, path: str, name: str) -> None:
    for kind in ("application/json", "text/plain", "application/json; charset=utf-16", ""):
        headers = {"content-type": kind} if kind else {}
        answer = door.send(httpx.Request("POST", f"http://test{path}", content=MALFORMED[name], headers=headers))
        check(answer)
        assert 400 <= answer.status_code < 500


def sound(path: str) -> dict[str, Any]:
    """A body that the address takes."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    hello = asking()["messages"]
    own = {"name": "f", "input_schema": {"type": "object"}}
    bodies: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": asking(tools=[tool], response_format=schema, tool_choice="auto", stream=False),
        "/v1/completions": {"model": MODEL, "prompt": "x", "logit_bias": {"1": 1}, "stop": ["x"]},
        "/v1/responses": {"model": MODEL, "input": hello, "tools": [{"type": "function", **tool["function"]}]},
        "/v1/messages": {"model": MODEL, "max_tokens": 9, "messages": hello, "tools": [own], "system": "x"},
        "/v1/messages/count_tokens": {"model": MODEL, "messages": hello, "tools": [own]},
        "/tokenize": {"prompt": "x"},
        "/detokenize": {"tokens": [1]},
    }
    return bodies.get(path, {"model": MODEL})


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a JSON value."""
    if at:
        yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*at, key))


def replaced(value: Any, at: tuple[Any, ...], odd: Any) -> Any:
    """The same value with something else in one place."""
    if not at:
        return odd
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[at[0]] = replaced(value[at[0]], at[1:], odd)
    return copy


@pytest.mark.parametrize("path", TAKING_BODIES)
def test_an_odd_value_in_any_place(door: Door, path: str) -> None:
    body = sound(path)
    answer = door.send(httpx.Request("POST", f"http://test{path}", json=body))
    assert answer.status_code == 200, answer.text
    for at in places(body):
        for odd in ODD:
            content = json.dumps(replaced(body, at, odd)).encode()
            headers = {"content-type": "application/json"}
            check(door.send(httpx.Request("POST", f"http://test{path}", content=content, headers=headers)))
