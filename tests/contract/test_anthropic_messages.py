"""/v1/messages as Anthropic's clients see it: bodies, events, errors, and what is refused by name."""

import json
from dataclasses import replace
from typing import Any

import httpx
import pytest

from odmoe_server.anthropic.answers import MessageAnswer
from odmoe_server.anthropic.schemas import FIELDS
from odmoe_server.engine_api import ExpertStats, Finished, FinishReason, GenerationRequest, NotReady, QueueFull
from odmoe_server.openai.tools_format import OWN
from support.drawn_answers import DrawingEngine
from support.http_app import MODEL, app_of, request
from support.scripted_engine import ScriptedEngine, tiny_tokenizer, words

PATH = "/v1/messages"
ADD = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
TOOLS = [{"name": "add", "description": "Adds.", "input_schema": ADD}, {"name": "now", "input_schema": {}}]
CALLS = OWN.written([("add", '{"a": 1}'), ("now", "{}")])
IMAGE = {"type": "image", "source": {"type": "url", "url": "https://example.com"}}


def body(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "max_tokens": 400, "messages": [{"role": "user", "content": "Hello"}], **fields}


def post(engine: ScriptedEngine, fields: dict[str, Any], *, path: str = PATH, **options: Any) -> httpx.Response:
    return request(app_of(engine, **options), "POST", path, json=fields)


def message(engine: ScriptedEngine, **fields: Any) -> dict[str, Any]:
    answer = post(engine, body(**fields))
    assert answer.status_code == 200, answer.text
    MessageAnswer.model_validate(answer.json(), strict=True)
    found: dict[str, Any] = answer.json()
    return found


def events(engine: ScriptedEngine, **fields: Any) -> list[dict[str, Any]]:
    answer = post(engine, body(stream=True, **fields))
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = []
    for block in answer.text.split("\n\n")[:-1]:
        kind, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert kind == f"event: {found[-1]['type']}"
    return found


def prompt_of(engine: ScriptedEngine) -> str:
    return str(tiny_tokenizer().decode(engine.requests[-1].prompt_ids))


def test_a_whole_answer() -> None:
    engine = ScriptedEngine.saying("Hi there.")
    found = message(engine)
    assert found["content"] == [{"type": "text", "text": "Hi there."}]
    assert found["id"].startswith("msg_")
    assert found["stop_reason"] == "end_turn"
    assert found["stop_sequence"] is None
    usage = found["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == len(engine.requests[0].prompt_ids)
    assert usage["output_tokens"] == len("Hi there.") + 1


def test_events_come_in_anthropics_order() -> None:
    found = events(ScriptedEngine.saying("Hi"))
    assert [event["type"] for event in found] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert found[0]["message"]["usage"]["input_tokens"] > 0
    assert found[0]["message"]["stop_reason"] is None
    assert "".join(event["delta"]["text"] for event in found[2:4]) == "Hi"
    assert found[5]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert found[5]["usage"]["output_tokens"] == 3


def test_the_system_prompt_and_blocks_reach_the_model() -> None:
    engine = ScriptedEngine.saying("x", context_length=4096)
    hint = {"type": "ephemeral"}
    messages = [
        {"role": "user", "content": "one"},
        {"role": "user", "content": [{"type": "text", "text": "two", "cache_control": hint}]},
        {"role": "assistant", "content": "three"},
        {"role": "user", "content": "four"},
    ]
    message(engine, system=[{"type": "text", "text": "Be brief.", "cache_control": hint}], messages=messages)
    assert prompt_of(engine).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\none\ntwo<|im_end|>")


def test_stop_sequences() -> None:
    found = message(ScriptedEngine.saying("One STOP two"), stop_sequences=["STOP"])
    assert found["content"][0]["text"] == "One "
    assert (found["stop_reason"], found["stop_sequence"]) == ("stop_sequence", "STOP")


def test_the_two_limits_are_told_apart() -> None:
    assert message(ScriptedEngine.saying("long"), max_tokens=2)["stop_reason"] == "max_tokens"
    engine = ScriptedEngine.saying("long " * 100, context_length=300)
    assert message(engine, max_tokens=100_000)["stop_reason"] == "model_context_window_exceeded"


def test_sampling_goes_to_the_engine() -> None:
    engine = ScriptedEngine.saying("x")
    message(engine, temperature=0.25, top_p=0.5, top_k=7)
    sampling = engine.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.25, 0.5, 7)


class Substituting(ScriptedEngine):
    """Of twelve experts three were replaced."""

    def _finished(self, request: GenerationRequest, num_tokens: int, *, reason: FinishReason) -> Finished:
        stats = ExpertStats(substituted=3, activations=12)
        return replace(super()._finished(request, num_tokens, reason=reason), expert_stats=stats)


def test_an_answer_with_replaced_experts_says_so() -> None:
    told = {"count": 3, "share": 0.25}
    assert message(Substituting.saying("Hi"))["usage"]["expert_substitutions"] == told
    assert events(Substituting.saying("Hi"))[-2]["usage"]["expert_substitutions"] == told
    assert "expert_substitutions" not in message(ScriptedEngine.saying("Hi"))["usage"]
    answer = request(app_of(Substituting.saying("Hi")), "POST", "/v1/responses", json={"model": MODEL, "input": "x"})
    assert answer.json()["usage"]["expert_substitutions"] == told


def test_calls_are_blocks() -> None:
    found = message(ScriptedEngine.saying("See.\n" + CALLS, context_length=4096), tools=TOOLS)
    text, first, second = found["content"]
    assert text == {"type": "text", "text": "See."}
    assert (first["name"], first["input"]) == ("add", {"a": 1})
    assert (second["name"], second["input"]) == ("now", {})
    assert first["id"].startswith("toolu_")
    assert first["id"] != second["id"]
    assert found["stop_reason"] == "tool_use"


def test_streamed_calls_are_blocks() -> None:
    found = events(ScriptedEngine.saying("See.\n" + CALLS, context_length=4096), tools=TOOLS)
    starts = [event for event in found if event["type"] == "content_block_start"]
    assert [event["index"] for event in starts] == [0, 1, 2]
    assert [event["content_block"]["type"] for event in starts] == ["text", "tool_use", "tool_use"]
    partial = [event["delta"]["partial_json"] for event in found if event.get("delta", {}).get("partial_json")]
    assert "".join(partial) == '{"a": 1}{}'
    assert found[-2]["delta"]["stop_reason"] == "tool_use"
    assert sum(event["type"] == "content_block_stop" for event in found) == 3


@pytest.mark.parametrize(
    "choice", [{"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "add"}]
)
def test_a_model_that_must_call_calls(choice: dict[str, Any]) -> None:
    found = message(DrawingEngine(context_length=8192), tools=TOOLS, tool_choice=choice)
    (call,) = found["content"]
    assert call["input"] in ({}, {"a": 1}, {"a": 2})
    assert found["stop_reason"] == "tool_use"


def test_results_go_back_to_the_model() -> None:
    engine = ScriptedEngine.saying("Two.", context_length=4096)
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "2"}], "is_error": True}
    messages = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "add", "input": {"a": 1}}]},
        {"role": "user", "content": [result, {"type": "text", "text": "So?"}]},
    ]
    message(engine, messages=messages, tools=TOOLS)
    assert OWN.written([("add", '{"a": 1}')]) in prompt_of(engine)
    assert "<tool_response>\nError: 2\n</tool_response>" in prompt_of(engine)
    assert "user\nSo?" in prompt_of(engine)


def test_json_that_follows_a_schema() -> None:
    config = {"format": {"type": "json_schema", "schema": ADD}}
    found = message(DrawingEngine(), output_config=config)
    assert json.loads(found["content"][0]["text"])["a"] in (1, 2)


@pytest.mark.parametrize("fields", [{}, {"tools": TOOLS, "system": "Be brief."}])
def test_tokens_are_counted_as_they_will_be_used(fields: dict[str, Any]) -> None:
    engine = ScriptedEngine.saying("x", context_length=4096)
    message(engine, **fields)
    asked = {name: value for name, value in body(**fields).items() if name != "max_tokens"}
    answer = post(ScriptedEngine(), asked, path=f"{PATH}/count_tokens")
    assert answer.json() == {"input_tokens": len(engine.requests[0].prompt_ids)}


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "last message"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "'image'"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use"}]}]}, "'tool_use'"),
        ({"temperature": 1.5}, "temperature"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"container": "x"}, "container"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"speed": "fast"}, "speed"),
        ({"output_config": {"effort": "high"}}, "effort"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"not": {}}}}}, "'output_config.format.schema"),
        ({"tools": [{"name": "f", "input_schema": {"properties": {"a": {"type": "x"}}}}]}, "'tools[0].input_schema'"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search_20250305"),
        ({"tools": [{**TOOLS[0], "defer_loading": True}]}, "defer_loading"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "x"}}, "not among the 'tools'"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"frequency_penalty": 1}, "frequency_penalty"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
    ],
)
def test_what_is_not_served_is_refused_by_name(fields: dict[str, Any], word: str) -> None:
    engine = ScriptedEngine.saying("x")
    answer = post(engine, body(**fields))
    assert answer.status_code == 400, answer.text
    assert answer.json()["type"] == "error"
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert word in answer.json()["error"]["message"]
    assert not engine.requests


@pytest.mark.parametrize("name", FIELDS)
def test_each_known_field_is_served_or_refused(name: str) -> None:
    app = app_of(ScriptedEngine.saying("x"))
    refused = request(app, "POST", PATH, json=body(**{name: {"odd": 1}}))
    assert refused.status_code == 400
    assert f"'{name}' is not supported" in refused.json()["error"]["message"]
    for neutral in (None, *FIELDS[name]):
        assert request(app, "POST", PATH, json=body(**{name: neutral})).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (QueueFull("full", retry_after_s=1), 429, "rate_limit_error"),
        (NotReady("no nodes"), 503, "overloaded_error"),
        (RuntimeError("secret"), 500, "api_error"),
    ],
)
def test_errors_have_anthropics_shape(stream: bool, error: Exception, status: int, kind: str) -> None:
    answer = post(ScriptedEngine(script=[error]), body(stream=stream))
    assert answer.status_code == status
    assert answer.json()["error"]["type"] == kind
    assert answer.json()["request_id"] == answer.headers["x-request-id"]
    assert "secret" not in answer.text


def test_errors_of_the_door_have_it_too() -> None:
    app = app_of(ScriptedEngine(), api_keys=("k",))
    answer = request(app, "POST", PATH, json=body())
    assert (answer.status_code, answer.json()["error"]["type"]) == (401, "authentication_error")
    keyed = {"x-api-key": "k"}
    assert request(app, "GET", PATH, headers=keyed).json()["type"] == "error"
    assert request(app, "POST", f"{PATH}/batches", headers=keyed).json()["error"]["type"] == "not_found_error"
    unknown = request(app, "POST", PATH, headers=keyed, json={**body(), "model": "claude"})
    assert unknown.json()["error"]["type"] == "not_found_error"
    assert "type" not in request(app, "GET", "/v1/nothing", headers=keyed).json()


def test_a_stream_that_breaks_off_says_so() -> None:
    found = events(ScriptedEngine(script=[*words("Once"), RuntimeError("secret")]))
    assert found[-1]["type"] == "error"
    assert found[-1]["error"]["type"] == "api_error"
    assert "secret" not in json.dumps(found)
