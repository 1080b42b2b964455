"""The real Anthropic SDK, strictly validating, against a real uvicorn with a scripted engine behind it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anthropic
import pytest

from odmoe_server.engine_api import QueueFull
from odmoe_server.openai.tools_format import OWN
from support.drawn_answers import DrawingEngine
from support.http_app import MODEL
from support.http_served import DEADLINE_S, running, until
from support.scripted_engine import Gate, ScriptedEngine, words

pytestmark = pytest.mark.slow
ADD = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
TOOL: Any = {"name": "add", "description": "Adds.", "input_schema": ADD}
HELLO: Any = [{"role": "user", "content": "Hello"}]
CALL = OWN.written([("add", '{"a": 1}')])


@contextmanager
def client(engine: ScriptedEngine, **options: object) -> Iterator[anthropic.Anthropic]:
    with (
        running(engine, **options) as server,
        anthropic.Anthropic(
            base_url=server.url,
            api_key="key",
            max_retries=0,
            timeout=DEADLINE_S,
            _strict_response_validation=True,
        ) as sdk,
    ):
        yield sdk


def test_a_whole_message() -> None:
    with client(ScriptedEngine.saying("One STOP")) as sdk:
        message = sdk.messages.create(
            model=MODEL, max_tokens=50, system="Be brief.", messages=HELLO, stop_sequences=["STOP"]
        )
    assert message.content[0].type == "text"
    assert message.content[0].text == "One "
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "STOP")


def test_a_streamed_message() -> None:
    with (
        client(ScriptedEngine.saying("Hello 🏔.")) as sdk,
        sdk.messages.stream(model=MODEL, max_tokens=50, messages=HELLO) as stream,
    ):
        assert "".join(stream.text_stream) == "Hello 🏔."
        final = stream.get_final_message()
    assert final.stop_reason == "end_turn"
    assert final.usage.output_tokens == len("Hello 🏔.".encode()) + 1


def test_tools_there_and_back() -> None:
    with client(ScriptedEngine.saying("See.\n" + CALL, context_length=8192)) as sdk:
        first = sdk.messages.create(model=MODEL, max_tokens=500, messages=HELLO, tools=[TOOL])
        text, call = first.content
        assert text.type == "text"
        assert call.type == "tool_use"
        assert (call.name, call.input) == ("add", {"a": 1})
        result: Any = {"type": "tool_result", "tool_use_id": call.id, "content": "2"}
        answer: Any = first.model_dump(exclude_none=True)["content"]
        messages = [*HELLO, {"role": "assistant", "content": answer}, {"role": "user", "content": [result]}]
        sdk.messages.create(model=MODEL, max_tokens=500, messages=messages, tools=[TOOL])
        with sdk.messages.stream(model=MODEL, max_tokens=500, messages=HELLO, tools=[TOOL]) as stream:
            final = stream.get_final_message()
    assert [block.type for block in final.content] == ["text", "tool_use"]
    assert final.content[1].type == "tool_use"
    assert final.content[1].input == {"a": 1}
    assert final.stop_reason == "tool_use"


def test_a_tool_that_must_be_used_is() -> None:
    with client(DrawingEngine(context_length=8192)) as sdk:
        message = sdk.messages.create(
            model=MODEL, max_tokens=4000, messages=HELLO, tools=[TOOL], tool_choice={"type": "tool", "name": "add"}
        )
    assert message.content[0].type == "tool_use"
    assert message.content[0].input in ({"a": 1}, {"a": 2})


def test_tokens_are_counted() -> None:
    engine = ScriptedEngine.saying("x", context_length=8192)
    with client(engine) as sdk:
        counted = sdk.messages.count_tokens(model=MODEL, messages=HELLO, tools=[TOOL])
        sdk.messages.create(model=MODEL, max_tokens=5, messages=HELLO, tools=[TOOL])
    assert counted.input_tokens == len(engine.requests[0].prompt_ids)


def test_errors_are_the_sdks_own() -> None:
    engine = ScriptedEngine.saying("x")
    with client(engine) as sdk:

        def ask(**fields: Any) -> None:
            sdk.messages.create(**{"model": MODEL, "max_tokens": 5, "messages": HELLO, **fields})

        with pytest.raises(anthropic.NotFoundError):
            ask(model="claude")
        with pytest.raises(anthropic.BadRequestError, match="thinking"):
            ask(thinking={"type": "enabled", "budget_tokens": 1024})
        with pytest.raises(anthropic.BadRequestError, match="colour"):
            ask(extra_body={"colour": "red"})
        engine.script = [QueueFull("full", retry_after_s=1)]
        with pytest.raises(anthropic.RateLimitError):
            ask()
        engine.unready("loading", "loading")
        with pytest.raises(anthropic.InternalServerError) as loading:
            ask()
        assert loading.value.status_code == 503


def test_a_wrong_key() -> None:
    with client(ScriptedEngine(), api_keys=("another",)) as sdk, pytest.raises(anthropic.AuthenticationError):
        sdk.messages.create(model=MODEL, max_tokens=5, messages=HELLO)


def test_a_client_that_goes_away_ends_the_generation() -> None:
    engine = ScriptedEngine(script=[*words("Hi"), Gate()])
    with client(engine) as sdk:
        with sdk.messages.stream(model=MODEL, max_tokens=50, messages=HELLO) as stream:
            assert next(iter(stream.text_stream)) == "H"
        until(lambda: engine.open_generators == 0)
