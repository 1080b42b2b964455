"""The OpenAPI document: every route is in it, every reference leads somewhere, and answers are what it says."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict

from odmoe_server.openai import answers
from odmoe_server.openai.answers import ChatChunk, ChatCompletion, TextCompletion
from odmoe_server.openai.schemas import ChatRequest, CompletionRequest
from support.http_app import CHAT, app_of, asking, events, request
from support.scripted_engine import ScriptedEngine


def document(**options: Any) -> dict[str, Any]:
    found: dict[str, Any] = request(app_of(ScriptedEngine(), **options), "GET", "/openapi.json", headers=KEY).json()
    return found


KEY = {"x-api-key": "key"}


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        node = list(node.values())
    for child in node if isinstance(node, list) else []:
        yield from references(child)


def test_every_reference_leads_somewhere() -> None:
    found = document()
    names = {f"#/components/schemas/{name}" for name in found["components"]["schemas"]}
    assert set(references(found)) <= names


@pytest.mark.parametrize(("path", "model"), [(CHAT, ChatRequest), ("/v1/completions", CompletionRequest)])
def test_request_bodies_are_what_is_parsed(path: str, model: type[BaseModel]) -> None:
    found = document()
    body = found["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    schema = found["components"]["schemas"][body["$ref"].rpartition("/")[2]]
    assert set(schema["properties"]) == set(model.model_fields)
    assert schema["additionalProperties"] is False
    assert "model" in schema["required"]


def test_nothing_of_the_frameworks_own_errors() -> None:
    text = json.dumps(document())
    assert "HTTPValidationError" not in text
    assert '"422"' not in text
    assert "ErrorBody" in text


def test_the_key_is_told_of_where_there_is_one() -> None:
    assert document(api_keys=("key",))["security"] == [{"key": []}]
    assert "security" not in document()


def test_every_route_is_told_of_once() -> None:
    paths = set(document()["paths"])
    assert {CHAT, "/v1/completions", "/v1/models", "/v1/models/{model_id}", "/tokenize", "/detokenize"} <= paths
    assert {
        "/health",
        "/health/live",
        "/health/ready",
        "/metrics",
        "/version",
        "/load",
        "/v1/stats",
        "/cluster",
    } <= paths
    assert "/chat/completions" not in paths  # the same, for clients that leave out /v1


def exactly(model: type[BaseModel]) -> type[BaseModel]:
    """The same, fields it does not have refused."""

    class Exact(model):  # type: ignore[misc, valid-type]
        model_config = ConfigDict(extra="forbid", strict=True)

    return Exact


EVERYTHING = {"logprobs": True, "top_logprobs": 2, "n": 2, "stop": "no", "return_metrics": True}
EVERYTHING |= {"return_expert_stats": True, "return_token_ids": True}


@pytest.mark.parametrize("fields", [{}, EVERYTHING, {"stop": "i"}])
def test_chat_answers_are_what_the_document_says(fields: dict[str, Any]) -> None:
    app = app_of(ScriptedEngine.saying("Hi é"))
    exactly(ChatCompletion).model_validate(request(app, "POST", CHAT, json=asking(**fields)).json())
    options = {"include_usage": True}
    *chunks, done = events(
        request(app, "POST", CHAT, json=asking(**fields, stream=True, stream_options=options)).content
    )
    assert done == "[DONE]"
    for chunk in chunks:
        exactly(ChatChunk).model_validate(chunk)


@pytest.mark.parametrize("fields", [{}, EVERYTHING | {"logprobs": 2, "top_logprobs": None}])
def test_text_answers_are_what_the_document_says(fields: dict[str, Any]) -> None:
    app = app_of(ScriptedEngine.saying("Hi é"))
    body = {"model": "tiny", "prompt": ["a", "b"], **{name: value for name, value in fields.items() if value}}
    exactly(TextCompletion).model_validate(request(app, "POST", "/v1/completions", json=body).json())
    content = request(app, "POST", "/v1/completions", json={**body, "stream": True}).content
    for chunk in events(content)[:-1]:
        exactly(TextCompletion).model_validate(chunk)


def test_inner_objects_are_held_to_it_too() -> None:
    """`exactly` looks at the outermost object; these are the ones inside."""
    chunk = events(
        request(
            app_of(ScriptedEngine.saying("Hi")), "POST", CHAT, json=asking(logprobs=True, top_logprobs=1, stream=True)
        ).content
    )[1]
    (choice,) = chunk["choices"]
    exactly(answers.ChunkChoice).model_validate(choice)
    exactly(answers.ChoiceLogprobs).model_validate(choice["logprobs"])
    exactly(answers.TokenLogprob).model_validate(choice["logprobs"]["content"][0])
