"""Everything that is refused: the status, OpenAI's error shape, and the name of the field."""

import json
from typing import Any

import httpx
import pytest

from odmoe_server.limits import ServiceLimits
from odmoe_server.openai.errors import TABLE, problem_of
from odmoe_server.openai.fields import CHAT_FIELDS, MESSAGE_FIELDS
from support.http_app import CHAT, MODEL, app_of, ask, asking, events, request
from support.scripted_engine import Gate, ScriptedEngine, words


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The error of an answer, once its shape has been looked at."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert isinstance(error["message"], str)
    return error


def refused(body: Any, status: int = 400) -> dict[str, Any]:
    engine = ScriptedEngine.saying("must not be asked")
    error = error_of(ask(engine, body), status)
    assert engine.requests == []
    return error


def messages(*given: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": list(given)}


def user(content: Any, **fields: Any) -> dict[str, Any]:
    return messages({"role": "user", "content": content, **fields})


WRONG: list[tuple[Any, str]] = [
    ({"messages": [{"role": "user", "content": "x"}]}, "model"),
    ({"model": MODEL}, "messages"),
    ({"model": 1, "messages": [{"role": "user", "content": "x"}]}, "model"),
    (messages(), "messages"),
    ({"model": MODEL, "messages": "x"}, "messages"),
    ({"model": MODEL, "messages": {"role": "user"}}, "messages"),
    (messages(123), "messages[0]"),
    (messages({}), "messages[0].role"),
    (messages({"role": "user", "content": "x"}, {"role": "user"}), "messages[1].content"),
    (messages({"role": 123, "content": "x"}), "messages[0].role"),
    (messages({"role": "wizard", "content": "x"}), "messages[0].role"),
    (messages({"role": "tool", "content": "x"}), "messages[0].tool_call_id"),
    (user(123), "messages[0].content"),
    (user(None), "messages[0].content"),
    (user({"text": "x"}), "messages[0].content"),
    (user([]), "messages[0].content"),
    (user(["x"]), "messages[0].content[0]"),
    (user([{"type": "text"}]), "messages[0].content[0].text"),
    (user([{"type": "text", "text": 1}]), "messages[0].content[0].text"),
    (user([{"type": "text", "text": "x"}, {"type": "image_url"}]), "messages[0].content[1].type"),
    (user([{"type": "input_audio"}]), "messages[0].content[0].type"),
    (user("x", color="red"), "messages[0].color"),
    (user("x", tool_calls=[{"id": "1"}]), "messages[0].tool_calls"),
    (asking(temperature=-0.1), "temperature"),
    (asking(temperature=2.1), "temperature"),
    (asking(temperature="0.5"), "temperature"),
    (asking(temperature=True), "temperature"),
    (asking(top_p=0), "top_p"),
    (asking(top_p=1.1), "top_p"),
    (asking(seed=2**63), "seed"),
    (asking(seed=1.5), "seed"),
    (asking(stop=""), "stop[0]"),
    (asking(stop=["x"] * 17), "stop"),
    (asking(stop=["x", 1]), "stop[1]"),
    (asking(stop="x" * 1001), "stop[0]"),
    (asking(stop={"x": 1}), "stop"),
    (asking(max_tokens=0), "max_tokens"),
    (asking(max_tokens=-1), "max_tokens"),
    (asking(max_tokens="5"), "max_tokens"),
    (asking(max_completion_tokens=0), "max_completion_tokens"),
    (asking(stream="yes"), "stream"),
    (asking(stream=1), "stream"),
    (asking(stream_options={"include_usage": True}), "stream_options"),
    (asking(stream=True, stream_options={"include_usage": 1}), "stream_options.include_usage"),
    (asking(stream=True, stream_options=[]), "stream_options"),
    (asking(stream=True, stream_options={"include_obfuscation": True}), "stream_options.include_obfuscation"),
    (asking(n=65), "n"),
    (asking(n=0), "n"),
    (asking(n=True), "n"),
    (asking(top_k=-2), "top_k"),
    (asking(top_k=1.5), "top_k"),
    (asking(min_p=1.1), "min_p"),
    (asking(presence_penalty=2.1), "presence_penalty"),
    (asking(frequency_penalty=-2.1), "frequency_penalty"),
    (asking(repetition_penalty=0), "repetition_penalty"),
    (asking(logit_bias={"7": 101}), "logit_bias.7"),
    (asking(logit_bias={"a": 1}), "logit_bias"),
    (asking(logit_bias={"-1": 1}), "logit_bias"),
    (asking(logit_bias={"1" * 5000: 1}), "logit_bias"),
    (asking(logit_bias={"100000": 1}), "logit_bias"),
    (asking(logit_bias=[1]), "logit_bias"),
    (asking(stop_token_ids=[10**6]), "stop_token_ids"),
    (asking(stop_token_ids=[-1]), "stop_token_ids"),
    (asking(stop_token_ids=["a"]), "stop_token_ids[0]"),
    (asking(min_tokens=-1), "min_tokens"),
    (asking(min_tokens=5, max_tokens=4), "min_tokens"),
    (asking(logprobs=1), "logprobs"),
    (asking(logprobs=True, top_logprobs=21), "top_logprobs"),
    (asking(logprobs=True, top_logprobs=-1), "top_logprobs"),
    (asking(top_logprobs=2), "top_logprobs"),
    (asking(logprobs=False, top_logprobs=0), "top_logprobs"),
    (asking(user=1), "user"),
    (asking(metadata={"a": 1}), "metadata.a"),
]


@pytest.mark.parametrize(("body", "param"), WRONG, ids=[f"{i}-{param}" for i, (_, param) in enumerate(WRONG)])
def test_the_field_is_named(body: Any, param: str) -> None:
    error = refused(body)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param


def test_an_unknown_field_is_refused_and_extra_body_explained() -> None:
    error = refused(asking(colour="red"))
    assert error["param"] == "colour"
    assert error["code"] == "unknown_parameter"
    assert "extra_body" in error["message"]


ASKS_FOR_SOMETHING = {"modalities": ["audio"]}


@pytest.mark.parametrize("field", CHAT_FIELDS)
def test_every_known_field_is_refused_by_name(field: str) -> None:
    error = refused(asking(**{field: ASKS_FOR_SOMETHING.get(field, {"some": "thing"})}))
    assert error["param"] == field
    assert error["code"] == "unsupported_parameter"
    assert f"'{field}'" in error["message"]


@pytest.mark.parametrize("field", CHAT_FIELDS)
def test_every_neutral_value_is_accepted(field: str) -> None:
    for value in (None, *CHAT_FIELDS[field]):
        assert ask(ScriptedEngine.saying("ok"), asking(**{field: value})).status_code == 200


@pytest.mark.parametrize("field", MESSAGE_FIELDS)
def test_every_known_field_of_a_message_is_refused_by_name(field: str) -> None:
    assert refused(user("x", **{field: "something"}))["param"] == f"messages[0].{field}"


TIGHT = ServiceLimits(max_messages=2, max_choices=3, max_stops=1, max_queued=4, max_wait_s=0.01, max_answer_s=0.02)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (messages(*[{"role": "user", "content": "x"}] * 3), "messages"),
        (asking(n=4), "n"),
        (asking(stop=["a", "b"]), "stop"),
    ],
)
def test_the_operators_limits(body: Any, param: str) -> None:
    engine = ScriptedEngine.saying("must not be asked")
    assert error_of(ask(engine, body, limits=TIGHT), 400)["param"] == param
    assert engine.requests == []


@pytest.mark.parametrize(("n", "status"), [(2, 200), (3, 429)])
def test_a_full_queue_is_told_before_the_messages_are_looked_at(n: int, status: int) -> None:
    """Two wait already, and each choice takes a place."""
    engine = ScriptedEngine.saying("x")
    answer = ask(engine, asking("y" * (10_000 if status == 429 else 1), n=n), limits=TIGHT)
    assert answer.status_code == status
    if status == 429:
        assert error_of(answer, 429)["code"] == "queue_full"
        assert answer.headers["retry-after"]


@pytest.mark.parametrize(("said", "status", "code"), [("", 503, "queue_timeout"), ("begun", 504, "generation_timeout")])
def test_an_answer_that_takes_too_long(said: str, status: int, code: str) -> None:
    engine = ScriptedEngine(script=[*words(said), Gate()])
    answer = ask(engine, asking(), limits=TIGHT)
    assert error_of(answer, status)["code"] == code
    assert ("retry-after" in answer.headers) == (status == 503)
    assert engine.open_generators == 0


def test_a_stream_that_takes_too_long_says_so_and_ends() -> None:
    engine = ScriptedEngine(script=[*words("begun"), Gate()])
    *_, last = events(ask(engine, asking(stream=True), limits=TIGHT).content)
    assert last["error"]["code"] == "generation_timeout"
    assert engine.open_generators == 0


RAW = [
    (b"{", "application/json"),
    (b"", "application/json"),
    (b"[1, 2]", "application/json"),
    (b'"text"', "application/json"),
    (b"null", "application/json"),
    (b"[" * 100_000, "application/json"),
    (b'{"model": "\xff"}', "application/json"),
    (json.dumps(asking()).encode(), "text/plain"),
    (json.dumps(asking()).encode(), "application/x-www-form-urlencoded"),
    (json.dumps(asking()).encode(), None),
]


@pytest.mark.parametrize(("content", "kind"), RAW)
def test_bodies_that_are_no_json_object(content: bytes, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    app = app_of(ScriptedEngine.saying("x"))
    assert error_of(request(app, "POST", CHAT, content=content, headers=headers), 400)["code"] == "malformed_body"


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none(value: str) -> None:
    content = json.dumps(asking()).replace("{", f'{{"temperature": {value}, ', 1)
    headers = {"content-type": "application/json"}
    answer = request(app_of(ScriptedEngine.saying("x")), "POST", CHAT, content=content, headers=headers)
    error_of(answer, 400)


def test_json_with_a_charset_is_json() -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    answer = request(app_of(ScriptedEngine.saying("x")), "POST", CHAT, content=json.dumps(asking()), headers=headers)
    assert answer.status_code == 200


@pytest.mark.parametrize("announced", [True, False])
def test_too_large_a_body(announced: bool) -> None:
    pieces = [b" " * 1000] * 3
    seen = 0

    async def body() -> Any:
        nonlocal seen
        for piece in pieces:
            seen += 1
            yield piece

    app = app_of(ScriptedEngine.saying("x"), limits=ServiceLimits(max_body_bytes=1000))
    headers = {"content-type": "application/json"}
    content: Any = b"".join(pieces) if announced else body()
    error = error_of(request(app, "POST", CHAT, content=content, headers=headers), 413)
    assert error["code"] == "request_too_large"


def test_a_large_body_is_parsed_all_the_same() -> None:
    engine = ScriptedEngine.saying("ok", context_length=10**6)
    assert ask(engine, asking("x" * 300_000)).status_code == 200
    assert error_of(ask(engine, asking("x" * 300_000, top_p=7)), 400)["param"] == "top_p"


def test_an_unknown_model() -> None:
    error = refused({"model": "gpt-4o", "messages": [{"role": "user", "content": "x"}]}, 404)
    assert error["code"] == "model_not_found"
    assert error["param"] == "model"
    assert MODEL in error["message"]


@pytest.mark.parametrize("stream", [True, False])
def test_too_long_a_prompt(stream: bool) -> None:
    engine = ScriptedEngine.saying("x", context_length=64)
    error = error_of(ask(engine, asking("y" * 64, stream=stream)), 400)
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == "messages"
    assert "64 tokens" in error["message"]
    assert engine.requests == []


def test_the_longest_prompt_leaves_room_for_one_token() -> None:
    engine = ScriptedEngine.saying("xy", context_length=64)
    overhead = 19
    body = ask(engine, asking("y" * (63 - overhead))).json()
    assert body["usage"]["total_tokens"] == 64
    assert error_of(ask(engine, asking("y" * (64 - overhead))), 400)["code"] == "context_length_exceeded"


def test_a_conversation_the_template_refuses() -> None:
    error = refused(messages({"role": "user", "content": "x"}, {"role": "system", "content": "late"}))
    assert error["param"] == "messages"
    assert "System message must come first" in error["message"]


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/v2/models"), ("POST", "/v2"), ("GET", "/v1/models/"), ("GET", "/docs")]
)
def test_an_unknown_route(method: str, path: str) -> None:
    error = error_of(request(app_of(ScriptedEngine()), method, path), 404)
    assert error["code"] in ("unknown_url", "model_not_found")


@pytest.mark.parametrize(("method", "path"), [("GET", CHAT), ("POST", "/v1/models"), ("DELETE", "/health")])
def test_a_wrong_method(method: str, path: str) -> None:
    answer = request(app_of(ScriptedEngine()), method, path)
    assert error_of(answer, 405)["code"] == "method_not_allowed"
    assert answer.headers["allow"]


def test_a_server_that_is_not_ready_says_so_before_it_looks_at_the_messages() -> None:
    engine = ScriptedEngine.saying("x")
    engine.unready("loading", "loading the weights")
    answer = ask(engine, asking("y" * 10_000))
    assert "loading the weights" in error_of(answer, 503)["message"]
    assert answer.headers["retry-after"]


def test_the_table_has_no_status_twice_for_one_code() -> None:
    assert all(row.status == 500 or row.code for row in TABLE.values())
    assert len({row.code for row in TABLE.values()}) == len(TABLE)


def test_what_is_not_in_the_table_shows_no_insides() -> None:
    problem = problem_of(ZeroDivisionError("secret"))
    assert problem.status == 500
    assert "secret" not in json.dumps(problem.body)


@pytest.mark.parametrize(
    ("path", "hint"),
    [("/v1/v1/chat/completions", "/v1 twice"), ("/v1/chat/completions/", "slash at its end"), ("/nowhere", "URL")],
)
def test_an_unknown_address_says_what_is_often_wrong(path: str, hint: str) -> None:
    error = error_of(request(app_of(ScriptedEngine()), "POST", path, json=asking()), 404)
    assert hint in error["message"]


def test_a_compressed_body_is_refused_as_such() -> None:
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    answer = request(app_of(ScriptedEngine()), "POST", CHAT, content=b"\x1f\x8b", headers=headers)
    assert "'gzip'" in error_of(answer, 400)["message"]
    headers["content-encoding"] = "identity"
    app = app_of(ScriptedEngine.saying("x"))
    assert request(app, "POST", CHAT, content=json.dumps(asking()), headers=headers).status_code == 200


def test_what_is_missing_or_empty_is_said_in_plain_words() -> None:
    assert refused({"model": MODEL})["message"] == "Missing required parameter: 'messages'."
    assert refused(messages())["message"] == "'messages' must have 1 or more items."
    assert refused(asking(bad_words=["x"] * 65))["message"] == "'bad_words' must have at most 64 items."
