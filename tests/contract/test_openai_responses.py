"""/v1/responses as OpenAI's clients see it: resources, typed events, what is kept, and what is refused by name."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from odmoe_server.engine_api import GenerationFailed, QueueFull
from odmoe_server.openai.responses_answers import ResponseResource
from odmoe_server.openai.responses_schemas import FIELDS
from odmoe_server.openai.responses_store import ResponseStore, Stored
from odmoe_server.openai.tools_format import OWN
from support.drawn_answers import DrawingEngine
from support.http_app import MODEL, Wire, app_of, request
from support.scripted_engine import Gate, ScriptedEngine, tiny_tokenizer, words

PATH = "/v1/responses"
ADD = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
TOOLS = [{"type": "function", "name": "add", "description": "Adds.", "parameters": ADD}]
CALL = OWN.written([("add", '{"a": 1}')])


def body(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "input": "Hello", **fields}


def post(app: FastAPI, fields: dict[str, Any], **options: Any) -> httpx.Response:
    return request(app, "POST", PATH, json=fields, **options)


def resource(engine: ScriptedEngine, **fields: Any) -> dict[str, Any]:
    answer = post(app_of(engine), body(**fields))
    assert answer.status_code == 200, answer.text
    ResponseResource.model_validate(answer.json(), strict=True)
    found: dict[str, Any] = answer.json()
    return found


def events_of(content: bytes) -> list[dict[str, Any]]:
    found = []
    for block in content.decode().split("\n\n")[:-1]:
        if not block.startswith(":"):
            kind, data = block.split("\n")
            found.append(json.loads(data.removeprefix("data: ")))
            assert kind == f"event: {found[-1]['type']}"
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def prompt_of(engine: ScriptedEngine) -> str:
    return str(tiny_tokenizer().decode(engine.requests[-1].prompt_ids))


def test_a_whole_response() -> None:
    engine = ScriptedEngine.saying("Hi there.")
    found = resource(engine, instructions="Be brief.", metadata={"a": "b"}, max_output_tokens=100, temperature=0)
    assert found["id"].startswith("resp_")
    assert found["status"] == "completed"
    assert found["completed_at"] >= found["created_at"]
    (item,) = found["output"]
    assert item["id"].startswith("msg_")
    assert item["status"] == "completed"
    assert item["content"][0]["text"] == "Hi there."
    assert found["metadata"] == {"a": "b"}
    assert (found["temperature"], found["top_p"]) == (0, 0.9)
    assert found["usage"]["total_tokens"] == found["usage"]["input_tokens"] + found["usage"]["output_tokens"]
    assert prompt_of(engine).startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert engine.requests[0].max_tokens == 100


def test_events_are_typed_and_in_order() -> None:
    found = events_of(post(app_of(ScriptedEngine.saying("Hi")), body(stream=True)).content)
    assert [event["type"] for event in found] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert found[0]["response"]["status"] == "in_progress"
    assert found[2]["item"]["content"] == []
    assert found[6]["text"] == "Hi"
    assert len({event["item_id"] for event in found if "item_id" in event}) == 1
    last = found[-1]["response"]
    ResponseResource.model_validate(last, strict=True)
    assert last["output"][0]["content"][0]["text"] == "Hi"
    assert last["id"] == found[0]["response"]["id"]
    assert last["usage"]["output_tokens"] == 3


def test_an_answer_that_is_cut_off_is_incomplete() -> None:
    found = resource(ScriptedEngine.saying("long"), max_output_tokens=2)
    assert found["status"] == "incomplete"
    assert found["incomplete_details"] == {"reason": "max_output_tokens"}
    assert found["output"][0]["status"] == "incomplete"
    assert found["completed_at"] is None


def test_calls_are_items() -> None:
    found = resource(ScriptedEngine.saying("See.\n" + CALL, context_length=4096), tools=TOOLS)
    message, call = found["output"]
    assert message["content"][0]["text"] == "See."
    assert (call["name"], call["arguments"], call["status"]) == ("add", '{"a": 1}', "completed")
    assert call["call_id"] != call["id"]
    assert found["tools"][0]["name"] == "add"


def test_streamed_calls_are_items() -> None:
    app = app_of(ScriptedEngine.saying("See.\n" + CALL, context_length=4096))
    found = events_of(post(app, body(stream=True, tools=TOOLS)).content)
    deltas = [event for event in found if event["type"] == "response.function_call_arguments.delta"]
    (done,) = [event for event in found if event["type"] == "response.function_call_arguments.done"]
    assert "".join(event["delta"] for event in deltas) == done["arguments"] == '{"a": 1}'
    assert {event["output_index"] for event in deltas} == {1}
    ended = [event["item"] for event in found if event["type"] == "response.output_item.done"]
    assert ended == found[-1]["response"]["output"]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "add"}])
def test_a_model_that_must_call_calls(choice: Any) -> None:
    found = resource(DrawingEngine(context_length=8192), tools=TOOLS, tool_choice=choice, parallel_tool_calls=False)
    (call,) = found["output"]
    assert json.loads(call["arguments"])["a"] in (1, 2)


def test_json_that_follows_a_schema() -> None:
    form = {"type": "json_schema", "name": "sum", "schema": ADD, "strict": True}
    found = resource(DrawingEngine(), text={"format": form})
    assert json.loads(found["output"][0]["content"][0]["text"])["a"] in (1, 2)
    assert found["text"]["format"]["name"] == "sum"


def test_a_conversation_goes_on() -> None:
    engine = ScriptedEngine.saying("One." + CALL, context_length=8192)
    app = app_of(engine)
    first = post(app, body(input="1+1?", instructions="Be brief.", tools=TOOLS)).json()
    result = {"type": "function_call_output", "call_id": first["output"][1]["call_id"], "output": "2"}
    second = post(app, body(previous_response_id=first["id"], input=[result], tools=TOOLS)).json()
    assert second["previous_response_id"] == first["id"]
    assert "Be brief." not in prompt_of(engine)
    assert "1+1?" in prompt_of(engine)
    assert "One.\n" + CALL in prompt_of(engine)
    assert "<tool_response>\n2\n</tool_response>" in prompt_of(engine)


def test_items_of_a_conversation_can_be_sent_back() -> None:
    engine = ScriptedEngine.saying("x", context_length=8192)
    app = app_of(ScriptedEngine.saying("One." + CALL, context_length=8192))
    items = post(app, body(tools=TOOLS)).json()["output"]
    output = [{"type": "input_text", "text": "2"}]
    result = {"type": "function_call_output", "call_id": items[1]["call_id"], "output": output}
    resource(engine, input=[{"role": "user", "content": "1+1?"}, *items, result], tools=TOOLS)
    assert "One.\n" + CALL in prompt_of(engine)


@pytest.mark.parametrize("stream", [True, False])
def test_a_response_is_kept_until_it_is_deleted(stream: bool) -> None:
    app = app_of(ScriptedEngine.saying("Hi"))
    answer = post(app, body(stream=stream))
    found = events_of(answer.content)[-1]["response"] if stream else answer.json()
    address = f"{PATH}/{found['id']}"
    assert request(app, "GET", address).json() == found
    assert request(app, "DELETE", address).json() == {"id": found["id"], "object": "response", "deleted": True}
    for method in ("GET", "DELETE"):
        assert request(app, method, address).json()["error"]["code"] == "response_not_found"
    gone = post(app, body(previous_response_id=found["id"]))
    assert (gone.status_code, gone.json()["error"]["param"]) == (400, "previous_response_id")


@pytest.mark.parametrize("stream", [True, False])
def test_nothing_is_kept_that_is_not_to_be(stream: bool) -> None:
    app = app_of(ScriptedEngine.saying("Hi"))
    answer = post(app, body(store=False, stream=stream))
    found = events_of(answer.content)[-1]["response"] if stream else answer.json()
    assert found["store"] is False
    assert request(app, "GET", f"{PATH}/{found['id']}").status_code == 404


def test_nobody_sees_what_another_key_made() -> None:
    app = app_of(ScriptedEngine.saying("Hi"), api_keys=("one", "two"))
    one, two = ({"authorization": f"Bearer {key}"} for key in ("one", "two"))
    made = post(app, body(), headers=one).json()["id"]
    assert request(app, "GET", f"{PATH}/{made}", headers=one).status_code == 200
    assert request(app, "GET", f"{PATH}/{made}", headers=two).status_code == 404
    assert request(app, "DELETE", f"{PATH}/{made}", headers=two).status_code == 404
    assert post(app, body(previous_response_id=made), headers=two).status_code == 400


def in_flight(engine: ScriptedEngine) -> tuple[FastAPI, Wire]:
    app = app_of(engine)
    return app, Wire(app, json.dumps(body(stream=True)).encode(), path=PATH)


async def call(app: FastAPI, method: str, path: str) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        return await client.request(method, path)


@pytest.mark.parametrize("verb", ["cancel", "delete"])
def test_an_answer_in_the_making_can_be_ended(verb: str) -> None:
    async def scenario() -> None:
        gate = Gate()
        engine = ScriptedEngine(script=[*words("Hi"), gate, *words("!"), Gate()])
        app, client = in_flight(engine)
        task = client.start()
        await client.until(b'"delta":"i"')
        address = f"{PATH}/{events_of(client.received)[0]['response']['id']}"
        assert (await call(app, "GET", address)).json()["status"] == "in_progress"
        if verb == "cancel":
            assert (await call(app, "POST", f"{address}/cancel")).json()["status"] == "cancelled"
        else:
            assert (await call(app, "DELETE", address)).status_code == 200
        gate.opened.set()
        await task
        last = events_of(client.received)[-1]
        assert (last["type"], last["response"]["status"]) == ("response.incomplete", "cancelled")
        assert engine.open_generators == 0
        assert engine.tokens_said == 3
        again = await call(app, "POST", f"{address}/cancel")
        assert again.status_code == (400 if verb == "cancel" else 404)

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_a_client_that_leaves_leaves_nothing_in_progress() -> None:
    async def scenario() -> None:
        engine = ScriptedEngine(script=[*words("Hi"), Gate()])
        app, client = in_flight(engine)
        task = client.start()
        await client.until(b'"delta":"i"')
        client.hang_up()
        await task
        response_id = events_of(client.received)[0]["response"]["id"]
        assert (await call(app, "GET", f"{PATH}/{response_id}")).json()["status"] == "cancelled"
        assert engine.open_generators == 0

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_a_stream_that_breaks_off_has_failed() -> None:
    app = app_of(ScriptedEngine(script=[*words("Once"), GenerationFailed("lost")]))
    last = events_of(post(app, body(stream=True)).content)[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["error"] == {"code": "server_error", "message": "lost"}
    assert request(app, "GET", f"{PATH}/{last['response']['id']}").json()["status"] == "failed"
    going_on = post(app, body(previous_response_id=last["response"]["id"]))
    assert "failed" in going_on.json()["error"]["message"]


@pytest.mark.parametrize("stream", [True, False])
def test_refusals_have_their_status(stream: bool) -> None:
    answer = post(app_of(ScriptedEngine(script=[QueueFull("full", retry_after_s=1)])), body(stream=stream))
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "1"


ITEM = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [1]}, "input[0]"),
        ({"input": [{**ITEM, "role": "tool"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input[0].type"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"type": "function_call_output", "call_id": "a", "output": "x"}]}, "input"),
        ({"input": [{"type": "function_call", "call_id": "a", "name": "f", "arguments": "["}]}, "input[0].arguments"),
        ({"background": True}, "background"),
        ({"conversation": "x"}, "conversation"),
        ({"include": ["reasoning.encrypted_content"]}, "include"),
        ({"max_tool_calls": 3}, "max_tool_calls"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"truncation": "auto"}, "truncation"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"prompt": {"id": "x"}}, "prompt"),
        ({"text": {"verbosity": "high"}}, "text.verbosity"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_object", "name": "x"}}}, "text.format.name"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}}, "text.format.schema"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "name": "f", "parameters": {"$ref": "#/x"}}]}, "tools[0].parameters"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice.type"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "x"}}, "tool_choice.name"),
        ({"messages": []}, "messages"),
        ({"previous_response_id": "resp_x"}, "previous_response_id"),
        ({"temperature": 3}, "temperature"),
    ],
)
def test_what_is_not_served_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    engine = ScriptedEngine.saying("x")
    answer = post(app_of(engine), body(**fields))
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert not engine.requests


@pytest.mark.parametrize("name", FIELDS)
def test_each_known_field_is_served_or_refused(name: str) -> None:
    app = app_of(ScriptedEngine.saying("x"))
    refused = post(app, body(**{name: {"odd": 1}}))
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, name)
    assert refused.json()["error"]["code"] == "unsupported_parameter"
    for neutral in (None, *FIELDS[name]):
        assert post(app, body(**{name: neutral})).status_code == 200


def test_a_kept_response_is_not_streamed_again() -> None:
    app = app_of(ScriptedEngine.saying("Hi"))
    made = post(app, body()).json()["id"]
    assert request(app, "GET", f"{PATH}/{made}?stream=true").json()["error"]["param"] == "stream"


def test_the_store_forgets_the_oldest() -> None:
    store = ResponseStore(max_stored=2, max_bytes=2000)

    def keep(name: str, size: int = 1) -> None:
        store.complete(Stored(owner="", body={"id": name, "status": "completed", "text": "x" * size}))

    def kept() -> set[str]:
        return {name for name in "abcd" if name in store._stored}

    keep("a")
    keep("b")
    keep("c")
    assert kept() == {"b", "c"}
    keep("d", size=1900)
    assert kept() == {"d"}
    store.delete("d", owner="")
    keep("a")
    assert kept() == {"a"}
