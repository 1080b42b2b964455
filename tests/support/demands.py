"""Demands on an answer's form, made of a real model through the real SDKs. What it says is its own affair."""

import json
from typing import Any

import anthropic
import openai
from fastapi import FastAPI

from support.http_served import running_app

DEADLINE_S = 200.0
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "London", "Rome"]}, "is_capital": {"type": "boolean"}},
    "required": ["city", "is_capital"],
    "additionalProperties": False,
}
ASKED: Any = [{"role": "user", "content": "What is the capital of France?"}]


def check_demands(app: FastAPI) -> None:
    """A schema over chat and responses, a tool over chat and messages; none of it needs many tokens."""
    with running_app(app) as server:
        options: Any = {"api_key": "key", "max_retries": 0, "timeout": DEADLINE_S, "_strict_response_validation": True}
        with openai.OpenAI(base_url=f"{server.url}/v1", **options) as sdk:
            _check_chat(sdk)
            form: Any = {"format": {"type": "json_schema", "name": "city", "schema": CITY}}
            response = sdk.responses.create(model="default", input="Name a capital.", text=form, max_output_tokens=99)
            assert set(json.loads(response.output_text)) == {"city", "is_capital"}
        with anthropic.Anthropic(base_url=server.url, **options) as claude:
            tool: Any = {"name": "look_up", "input_schema": CITY}
            message = claude.messages.create(
                model="default", max_tokens=99, messages=ASKED, tools=[tool], tool_choice={"type": "any"}
            )
        assert message.content[0].type == "tool_use"
        assert set(message.content[0].input) == {"city", "is_capital"}


def _check_chat(sdk: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
    answer = sdk.chat.completions.create(
        model="default", messages=ASKED, response_format=form, temperature=0, max_tokens=99
    )
    assert answer.choices[0].finish_reason == "stop"
    assert set(json.loads(answer.choices[0].message.content or "")) == {"city", "is_capital"}
    tool: Any = {"type": "function", "function": {"name": "look_up", "parameters": CITY}}
    called = sdk.chat.completions.create(
        model="default",
        messages=ASKED,
        tools=[tool],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=99,
    )
    (call,) = called.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert set(json.loads(call.function.arguments)) == {"city", "is_capital"}
