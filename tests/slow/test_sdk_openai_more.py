"""Tools, schemas and responses through the real OpenAI SDK, strictly validated, against a real uvicorn."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from odmoe_server.openai.tools_format import OWN
from support.drawn_answers import DrawingEngine
from support.http_app import MODEL
from support.http_served import DEADLINE_S, Served, running, until
from support.scripted_engine import Gate, ScriptedEngine, words

pytestmark = pytest.mark.slow
ADD = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
CHAT_TOOL: Any = {"type": "function", "function": {"name": "add", "parameters": ADD, "strict": True}}
TOOL: Any = {"type": "function", "name": "add", "parameters": ADD, "strict": True}
HELLO: Any = [{"role": "user", "content": "Hello"}]
CALL = OWN.written([("add", '{"a": 1}')])


class Sum(BaseModel):
    """What the SDK makes a schema of."""

    is_even: bool
    parity: bool


@contextmanager
def client(engine: ScriptedEngine) -> Iterator[tuple[openai.OpenAI, Served]]:
    with (
        running(engine) as server,
        openai.OpenAI(
            base_url=f"{server.url}/v1",
            api_key="key",
            max_retries=0,
            timeout=DEADLINE_S,
            _strict_response_validation=True,
        ) as sdk,
    ):
        yield sdk, server


def test_chat_tools_there_and_back() -> None:
    with client(ScriptedEngine.saying("See.\n" + CALL, context_length=8192)) as (sdk, _):
        first = sdk.chat.completions.create(model=MODEL, messages=HELLO, tools=[CHAT_TOOL])
        message = first.choices[0].message
        assert message.tool_calls is not None
        call = message.tool_calls[0]
        assert call.type == "function"
        assert (call.function.name, json.loads(call.function.arguments)) == ("add", {"a": 1})
        result = {"role": "tool", "tool_call_id": call.id, "content": "2"}
        history = [*HELLO, message.model_dump(exclude_none=True), result]
        sdk.chat.completions.create(model=MODEL, messages=history, tools=[CHAT_TOOL])
        with sdk.chat.completions.stream(model=MODEL, messages=HELLO, tools=[CHAT_TOOL]) as stream:
            final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    assert final.message.content == "See."
    assert final.message.tool_calls is not None
    assert final.message.tool_calls[0].function.parsed_arguments == {"a": 1}


def test_the_sdks_own_schemas_are_followed() -> None:
    with client(DrawingEngine()) as (sdk, _):
        parsed = sdk.chat.completions.parse(model=MODEL, messages=HELLO, response_format=Sum)
        assert isinstance(parsed.choices[0].message.parsed, Sum)
        assert isinstance(sdk.responses.parse(model=MODEL, input="Hello", text_format=Sum).output_parsed, Sum)


def test_responses_are_made_kept_and_gone_on_from() -> None:
    with client(ScriptedEngine.saying("Hi. " + CALL, context_length=8192)) as (sdk, _):
        first = sdk.responses.create(model=MODEL, input="Hello", instructions="Be brief.", tools=[TOOL])
        assert first.output_text == "Hi."
        call = first.output[1]
        assert call.type == "function_call"
        assert sdk.responses.retrieve(first.id) == first
        result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "2"}
        second = sdk.responses.create(
            model=MODEL, previous_response_id=first.id, input=[result], tools=[TOOL], max_output_tokens=2
        )
        assert second.status == "incomplete"
        sdk.responses.delete(first.id)
        with pytest.raises(openai.NotFoundError):
            sdk.responses.retrieve(first.id)


def test_responses_are_streamed_as_events() -> None:
    with client(ScriptedEngine.saying("Hi. " + CALL, context_length=8192)) as (sdk, _):
        events = list(sdk.responses.create(model=MODEL, input="Hello", tools=[TOOL], stream=True))
        assert events[0].type == "response.created"
        assert events[-1].type == "response.completed"
        with sdk.responses.stream(model=MODEL, input="Hello", tools=[TOOL]) as stream:
            final = stream.get_final_response()
    assert final.output_text == "Hi."
    assert final.output[1].type == "function_call"


def test_a_response_is_cancelled() -> None:
    gate = Gate()
    engine = ScriptedEngine(script=[*words("Hi"), gate, *words(" and more")])
    with client(engine) as (sdk, server):
        stream = sdk.responses.create(model=MODEL, input="Hello", stream=True)
        response_id = next(event.response.id for event in stream if event.type == "response.created")
        assert sdk.responses.cancel(response_id).status == "cancelled"
        server.open(gate)
        last = list(stream)[-1]
        assert last.type == "response.incomplete"
        assert last.response.status == "cancelled"
        with pytest.raises(openai.BadRequestError):
            sdk.responses.cancel(response_id)
        until(lambda: engine.open_generators == 0)


def test_refusals_name_the_field() -> None:
    with client(ScriptedEngine.saying("x")) as (sdk, _):
        with pytest.raises(openai.BadRequestError) as refused:
            sdk.responses.create(model=MODEL, input="x", background=True)
        assert refused.value.param == "background"
        with pytest.raises(openai.BadRequestError) as odd:
            sdk.responses.create(model=MODEL, input="x", tools=[{"type": "web_search"}])
        assert odd.value.param == "tools[0].type"
        form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}
        with pytest.raises(openai.BadRequestError) as schema:
            sdk.chat.completions.create(model=MODEL, messages=HELLO, response_format=form)
        assert schema.value.param == "response_format.json_schema.schema"
