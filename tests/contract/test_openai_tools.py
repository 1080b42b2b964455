"""Tools and response formats as OpenAI's clients see them, with scripted answers and with drawn ones."""

import json
from typing import Any

import pytest

from odmoe_server.limits import ServiceLimits
from odmoe_server.openai.answers import ChatChunk, ChatCompletion
from odmoe_server.openai.tools_format import OWN
from support.drawn_answers import DrawingEngine
from support.http_app import ask, asking, events
from support.scripted_engine import ScriptedEngine, tiny_tokenizer, words

ADD = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["a"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": ADD}},
    {"type": "function", "function": {"name": "now"}},
]
CALLS = OWN.written([("add", '{"a": 1}'), ("now", "{}")])


def with_tools(**fields: Any) -> dict[str, Any]:
    return asking(tools=TOOLS, **fields)


def prompt_of(engine: ScriptedEngine) -> str:
    return str(tiny_tokenizer().decode(engine.requests[-1].prompt_ids))


def message_of(engine: ScriptedEngine, body: dict[str, Any]) -> dict[str, Any]:
    answer = ask(engine, body)
    assert answer.status_code == 200, answer.text
    ChatCompletion.model_validate(answer.json(), strict=True)
    choice: dict[str, Any] = answer.json()["choices"][0]
    return {**choice["message"], "finish_reason": choice["finish_reason"]}


def test_calls_come_as_tool_calls() -> None:
    engine = ScriptedEngine.saying("Let me see.\n" + CALLS, context_length=4096)
    message = message_of(engine, with_tools())
    assert message["content"] == "Let me see."
    assert message["finish_reason"] == "tool_calls"
    first, second = message["tool_calls"]
    assert first["type"] == "function"
    assert first["function"] == {"name": "add", "arguments": '{"a": 1}'}
    assert second["function"] == {"name": "now", "arguments": "{}"}
    assert first["id"] != second["id"]
    assert '"name": "add"' in prompt_of(engine)
    assert "Adds." in prompt_of(engine)


def test_a_message_of_calls_alone_has_no_content() -> None:
    message = message_of(ScriptedEngine.saying(CALLS, context_length=4096), with_tools())
    assert message["content"] is None


def test_text_without_calls_is_text() -> None:
    message = message_of(ScriptedEngine.saying("Hello", context_length=4096), with_tools())
    assert message["content"] == "Hello"
    assert message["finish_reason"] == "stop"
    assert "tool_calls" not in message


def test_streamed_calls_carry_id_and_name_once() -> None:
    engine = ScriptedEngine.saying("See.\n" + CALLS, context_length=4096)
    *chunks, done = events(ask(engine, with_tools(stream=True)).content)
    assert done == "[DONE]"
    for chunk in chunks:
        ChatChunk.model_validate(chunk, strict=True)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    calls: dict[int, dict[str, str]] = {}
    for delta in deltas:
        for call in delta.get("tool_calls", []):
            function = call["function"]
            if "id" in call:
                assert call["index"] not in calls
                calls[call["index"]] = {"name": function["name"], "arguments": "", "id": call["id"]}
            calls[call["index"]]["arguments"] += function["arguments"]
    assert [(call["name"], call["arguments"]) for call in calls.values()] == [("add", '{"a": 1}'), ("now", "{}")]
    assert "".join(delta.get("content") or "" for delta in deltas) == "See."
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert sum(len(delta.get("tool_calls", [])) for delta in deltas) > 6  # arguments come as they are written


def test_a_call_that_is_cut_off_says_so() -> None:
    engine = ScriptedEngine.saying(CALLS, context_length=4096)
    message = message_of(engine, with_tools(max_tokens=len(OWN.begin + "add" + OWN.middle) + 4))
    assert message["tool_calls"][0]["function"]["arguments"] == '{"a"'
    assert message["finish_reason"] == "length"


def test_without_choice_there_are_no_tools() -> None:
    engine = ScriptedEngine.saying(CALLS, context_length=4096)
    message = message_of(engine, with_tools(tool_choice="none"))
    assert message["content"] == CALLS
    assert "add" not in prompt_of(engine)
    assert engine.requests[0].sampling.constraint is None


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_a_model_that_must_call_calls(choice: Any, seed: int) -> None:
    engine = DrawingEngine(context_length=8192, seed=seed)
    message = message_of(engine, with_tools(tool_choice=choice))
    assert message["content"] is None
    assert message["finish_reason"] == "tool_calls"
    names = [call["function"]["name"] for call in message["tool_calls"]]
    assert names == ["add"] if choice != "required" else set(names) <= {"add", "now"}
    for call in message["tool_calls"]:
        arguments = json.loads(call["function"]["arguments"])
        assert set(arguments) == ({"a"} if call["function"]["name"] == "add" else set())


def test_without_parallel_calls_there_is_one() -> None:
    for seed in range(4):
        engine = DrawingEngine(context_length=8192, seed=seed)
        message = message_of(engine, with_tools(tool_choice="required", parallel_tool_calls=False))
        assert len(message["tool_calls"]) == 1


def test_a_call_begun_by_choice_is_made_whole() -> None:
    engine = DrawingEngine(script=words("Well, " + OWN.trigger), context_length=8192)
    message = message_of(engine, with_tools(parallel_tool_calls=False))
    assert message["content"] == "Well,"
    assert message["tool_calls"][0]["function"]["name"] in ("add", "now")


def test_calls_and_results_go_back_to_the_model() -> None:
    engine = ScriptedEngine.saying("Two.", context_length=4096)
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "2"}]},
    ]
    assert message_of(engine, with_tools(messages=messages))["content"] == "Two."
    assert OWN.written([("add", '{"a": 1}')]) in prompt_of(engine)
    assert "<tool_response>\n2\n</tool_response>" in prompt_of(engine)


@pytest.mark.parametrize("seed", range(3))
def test_json_that_follows_a_schema(seed: int) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "sum", "schema": ADD, "strict": True}}
    message = message_of(DrawingEngine(seed=seed), asking(response_format=form))
    assert set(json.loads(message["content"])) == {"a"}
    assert message["finish_reason"] == "stop"


def test_json_or_calls() -> None:
    form = {"type": "json_schema", "json_schema": {"name": "sum", "schema": ADD}}
    kinds = set()
    for seed in range(12):
        engine = DrawingEngine(context_length=8192, seed=seed)
        message = message_of(engine, with_tools(response_format=form, parallel_tool_calls=False))
        kinds.add(message["finish_reason"])
        if message["content"] is not None:
            assert set(json.loads(message["content"])) == {"a"}
    assert kinds == {"stop", "tool_calls"}


def test_any_json_object() -> None:
    engine = ScriptedEngine.saying("{}")
    message = message_of(engine, asking(response_format={"type": "json_object"}))
    assert message["content"] == "{}"
    assert engine.requests[0].sampling.constraint is not None


def test_a_named_text_format_asks_nothing() -> None:
    engine = ScriptedEngine.saying("x")
    message_of(engine, asking(response_format={"type": "text"}))
    assert engine.requests[0].sampling.constraint is None


def schema_format(schema: Any, **more: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **more}}}


def tool_of(parameters: Any, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": parameters, **more}}


SCHEMA = "response_format.json_schema.schema"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (schema_format({"type": "strin"}), SCHEMA),
        (schema_format({"type": "string", "pattern": "("}), SCHEMA),
        (schema_format({"not": {}}, strict=False), SCHEMA),
        (schema_format({"$ref": "#/nowhere"}), SCHEMA),
        (schema_format({"description": "x" * 200_000}), SCHEMA),
        (schema_format([]), SCHEMA),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, SCHEMA),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "grammar"}}, "response_format"),
        ({"response_format": "json_object"}, "response_format"),
        ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
        ({"response_format": {"type": "json_object"}, "min_tokens": 3}, "min_tokens"),
        ({"tools": [tool_of({"type": "string"})]}, "tools[0].function.parameters.type"),
        ({"tools": [TOOLS[0], tool_of({"properties": {"a": {"type": "strin"}}})]}, "tools[1].function.parameters"),
        ({"tools": [TOOLS[0], tool_of({"not": {}}, strict=True)]}, "tools[1].function.parameters"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools[1].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "f", "colour": 1}}]}, "tools[0].function.colour"),
        ({"tools": [1]}, "tools[0]"),
        ({"tools": "add"}, "tools"),
        ({"tools": TOOLS * 100}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice.function.name"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}, "tool_choice.type"),
        ({"tools": TOOLS, "parallel_tool_calls": 1}, "parallel_tool_calls"),
        ({"tools": TOOLS, "logprobs": True}, "logprobs"),
        ({"tools": TOOLS, "ignore_eos": True}, "ignore_eos"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "a"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "a"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "function", "name": "f", "content": "x"}]}, "messages[0].role"),
    ],
)
def test_what_cannot_be_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    engine = ScriptedEngine.saying("x")
    answer = ask(engine, {**asking(), **fields})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert not engine.requests


def test_the_largest_schema_can_be_set() -> None:
    form = schema_format({"type": "object", "description": "x" * 1000})
    limits = ServiceLimits(max_schema_bytes=1000)
    assert ask(ScriptedEngine.saying("{}"), asking(**form)).status_code == 200
    assert ask(ScriptedEngine.saying("{}"), asking(**form), limits=limits).json()["error"]["param"] == SCHEMA
    tools = {"tools": [tool_of({"description": "x" * 1000})]}
    refused = ask(ScriptedEngine.saying("x", context_length=4096), asking(**tools), limits=limits)
    assert refused.json()["error"]["param"] == "tools[0].function.parameters"


@pytest.mark.parametrize("arguments", ["{", "[]", "1"])
def test_arguments_that_are_no_object_are_refused(arguments: str) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": arguments}}
    body = asking(messages=[{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}])
    answer = ask(ScriptedEngine.saying("x"), body)
    assert answer.json()["error"]["param"] == "messages[1].tool_calls[0].function.arguments"


@pytest.mark.parametrize("fields", [{"tools": []}, {"tools": None, "tool_choice": "auto"}, {"tool_choice": "none"}])
def test_no_tools_change_nothing(fields: dict[str, Any]) -> None:
    engine = ScriptedEngine.saying(CALLS)
    assert message_of(engine, asking(**fields))["content"] == CALLS
    assert engine.requests[0].sampling.constraint is None
