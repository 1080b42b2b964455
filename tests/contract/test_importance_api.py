"""`expert_substitution` in requests, and answers that say what was replaced for them, as clients see it."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest

from odmoe_server.engine_api import ExpertStats, Finished, GenerationRequest, Substituted, Token
from odmoe_server.limits import ServiceLimits
from odmoe_server.openai.answers import ChatChunk, ChatCompletion
from support.http_app import CHAT, app_of, asking, events, request
from support.scripted_engine import ScriptedEngine

MODE = {"limits": ServiceLimits(substitutes=True)}
COMPLETIONS = "/v1/completions"
TEXT = {"model": "tiny", "prompt": "a"}


class Substituting(ScriptedEngine):
    """Of each token's four experts one was replaced."""

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Token | Finished, None]:
        count = 0
        async with aclosing(super().generate(request)) as said:
            async for event in said:
                if isinstance(event, Token):
                    count += 1
                    yield replace(event, substituted=Substituted(count, 4 * count))
                else:
                    yield replace(event, expert_stats=ExpertStats(substituted=3, activations=12))


def post(engine: ScriptedEngine, path: str = CHAT, body: dict[str, Any] | None = None) -> Any:
    return request(app_of(engine, **MODE), "POST", path, json=asking() if body is None else body)


@pytest.mark.parametrize(
    ("path", "body"), [(CHAT, asking()), (COMPLETIONS, TEXT), (CHAT, asking(n=2)), (COMPLETIONS, {**TEXT, "n": 2})]
)
@pytest.mark.parametrize("asked", [None, 0, 0.0, 0.35, 1])
def test_the_wish_reaches_the_engine(path: str, body: dict[str, Any], asked: float | None) -> None:
    engine = ScriptedEngine.saying("Hi")
    assert post(engine, path, {**body, "expert_substitution": asked}).status_code == 200
    assert {one.alpha for one in engine.requests} == {asked}


@pytest.mark.parametrize("asked", [-0.1, 1.1, "0.3", [0.3]])
def test_what_is_no_share_is_refused(asked: Any) -> None:
    answer = post(ScriptedEngine.saying("Hi"), body=asking(expert_substitution=asked))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "expert_substitution"


@pytest.mark.parametrize(("path", "body"), [(CHAT, asking()), (COMPLETIONS, TEXT)])
def test_a_server_that_replaces_none_says_so_unless_none_is_asked_for(path: str, body: dict[str, Any]) -> None:
    app = app_of(ScriptedEngine.saying("Hi"))
    refused = request(app, "POST", path, json={**body, "expert_substitution": 0.3})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "expert_substitution"
    assert "replaces no experts" in refused.json()["error"]["message"]
    assert request(app, "POST", path, json={**body, "expert_substitution": 0}).status_code == 200


@pytest.mark.parametrize(("path", "body"), [(CHAT, asking()), (COMPLETIONS, TEXT)])
def test_an_answer_says_what_was_replaced_for_it(path: str, body: dict[str, Any]) -> None:
    answer = post(Substituting.saying("Hello"), path, body).json()
    assert answer["usage"]["expert_substitutions"] == {"count": 3, "share": 0.25}
    without = post(ScriptedEngine.saying("Hello"), path, body).json()
    assert "expert_substitutions" not in without["usage"]


def test_several_answers_say_it_together() -> None:
    answer = post(Substituting.saying("Hello"), body=asking(n=2)).json()
    assert answer["usage"]["expert_substitutions"] == {"count": 6, "share": 0.25}


def test_an_answer_that_a_stop_string_ended_says_it_too() -> None:
    """The engine is not asked for its counts then; those that came with the tokens are told."""
    answer = post(Substituting.saying("Hello"), body=asking(stop="ll")).json()
    assert answer["choices"][0]["stop_reason"] == "ll"
    assert answer["usage"]["expert_substitutions"] == {"count": 4, "share": 0.25}


@pytest.mark.parametrize(("path", "body"), [(CHAT, asking()), (COMPLETIONS, TEXT)])
@pytest.mark.parametrize("usage", [True, False])
def test_a_stream_says_it_where_it_ends_with_or_without_usage(path: str, body: dict[str, Any], usage: bool) -> None:
    fields = {"stream": True, **({"stream_options": {"include_usage": True}} if usage else {})}
    *chunks, done = events(post(Substituting.saying("Hello"), path, {**body, **fields}).content)
    assert done == "[DONE]"
    (ending,) = [chunk for chunk in chunks if chunk["choices"] and chunk["choices"][0]["finish_reason"]]
    assert ending["expert_substitutions"] == {"count": 3, "share": 0.25}
    assert [chunk for chunk in chunks if "expert_substitutions" in chunk] == [ending]
    if usage:
        assert chunks[-1]["usage"]["expert_substitutions"] == {"count": 3, "share": 0.25}


def test_the_document_knows_it() -> None:
    body = asking(stream=True, stream_options={"include_usage": True})
    for chunk in events(post(Substituting.saying("Hi"), body=body).content)[:-1]:
        ChatChunk.model_validate(chunk)
    whole = ChatCompletion.model_validate(post(Substituting.saying("Hi")).json())
    assert whole.usage.expert_substitutions is not None
