"""POST /v1/chat/completions, whole answers: the body, what reaches the engine, where text ends."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.http_app import ALIAS, CHAT, MODEL, app_of, ask, asking, events, request, text_of
from support.scripted_engine import ScriptedEngine, tiny_tokenizer, words


def test_the_body_is_what_openai_sends() -> None:
    engine = ScriptedEngine.saying("Hi there.")
    before = int(time.time())
    answer = ask(engine)
    body = answer.json()
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert re.fullmatch(r"chatcmpl-[0-9a-f]{32}", body.pop("id"))
    assert before <= body.pop("created") <= time.time()
    num_prompt = len(engine.requests[0].prompt_ids)
    assert body == {
        "object": "chat.completion",
        "model": MODEL,
        "system_fingerprint": "odmoe_0123456789ab",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hi there.", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": 10,
            "total_tokens": num_prompt + 10,
            "prompt_tokens_details": {"cached_tokens": 3},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
    }


def prompt_of(engine: ScriptedEngine) -> str:
    return str(tiny_tokenizer().decode(engine.requests[0].prompt_ids))


def test_the_prompt_is_the_chat_template() -> None:
    engine = ScriptedEngine.saying("ok")
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "Three.", "refusal": None, "tool_calls": None},
        {"role": "user", "content": "And?"},
    ]
    assert ask(engine, {"model": ALIAS, "messages": messages}).json()["model"] == ALIAS
    assert prompt_of(engine) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOne\ntwo<|im_end|>\n"
        "<|im_start|>assistant\nThree.<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_control_tokens_in_a_message_are_text() -> None:
    engine = ScriptedEngine.saying("ok")
    ask(engine, asking("<|im_end|>"))
    end_id = tiny_tokenizer().convert_tokens_to_ids("<|im_end|>")
    assert engine.requests[0].prompt_ids.count(end_id) == 1
    assert "<|im_end|><|im_end|>" in prompt_of(engine)


def test_sampling_reaches_the_engine() -> None:
    engine = ScriptedEngine.saying("ok")
    ask(engine, asking(temperature=0, top_p=0.25, seed=-(2**63), max_tokens=9, ignore_eos=True))
    asked = engine.requests[0]
    assert (asked.sampling.temperature, asked.sampling.top_p, asked.sampling.seed) == (0, 0.25, -(2**63))
    assert asked.sampling.ignore_eos
    assert asked.max_tokens == 9


def test_what_is_not_said_is_the_models_default() -> None:
    engine = ScriptedEngine.saying("ok", context_length=100)
    ask(engine, asking(temperature=None, max_tokens=None))
    asked = engine.requests[0]
    assert (asked.sampling.temperature, asked.sampling.top_p, asked.sampling.seed) == (0.5, 0.9, None)
    assert asked.max_tokens == 100 - len(asked.prompt_ids)


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({"max_tokens": 3}, 3),
        ({"max_completion_tokens": 4}, 4),
        ({"max_tokens": 3, "max_completion_tokens": 4}, 4),
        ({"max_tokens": 10**9}, 512 - 24),
    ],
)
def test_token_limits(fields: dict[str, int], limit: int) -> None:
    engine = ScriptedEngine.saying("x" * 600)
    body = ask(engine, asking(**fields)).json()
    assert engine.requests[0].max_tokens == limit
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == limit


def test_requests_get_ids_of_their_own_in_the_engine() -> None:
    engine = ScriptedEngine.saying("ok")
    app = app_of(engine)
    for _ in range(2):
        request(app, "POST", CHAT, json=asking(), headers={"x-request-id": "the-same"})
    first, second = engine.requests
    assert first.request_id != second.request_id


@pytest.mark.parametrize(
    ("stop", "said", "shown"),
    [
        ("END", "one END two", "one "),
        (["two", "END"], "one END two", "one "),
        ("\n\n", "a\nb\n\nc", "a\nb"),
        ("x", "no such letter", "no such letter"),
        ("letters and", "no such letters", "no such letters"),
        (["abcd", "bc"], "abcd", "a"),
    ],
)
def test_stop_strings(stop: str | list[str], said: str, shown: str) -> None:
    engine = ScriptedEngine.saying(said)
    body = ask(engine, asking(stop=stop)).json()
    assert body["choices"][0]["message"]["content"] == shown
    assert body["choices"][0]["finish_reason"] == "stop"
    assert engine.open_generators == 0


def test_a_stop_string_ends_the_generation_and_counts_its_tokens() -> None:
    engine = ScriptedEngine.saying("one END and much more")
    usage = ask(engine, asking(stop="END")).json()["usage"]
    assert engine.tokens_said == usage["completion_tokens"] == len("one END")


@pytest.mark.parametrize("text", ["Zürich 🏔️ 東京", "🏔"])
def test_characters_of_several_tokens(text: str) -> None:
    assert ask(ScriptedEngine.saying(text)).json()["choices"][0]["message"]["content"] == text


def test_half_a_character_at_the_end_becomes_one_replacement() -> None:
    engine = ScriptedEngine(script=words("ok 🏔")[:-1])
    assert ask(engine).json()["choices"][0]["message"]["content"] == "ok \ufffd"


def test_special_tokens_are_not_shown() -> None:
    end_id = tiny_tokenizer().convert_tokens_to_ids("<|im_end|>")
    engine = ScriptedEngine(script=[*words("a b"), *[end_id] * 20, *words(" c")])
    assert ask(engine, asking(ignore_eos=True)).json()["choices"][0]["message"]["content"] == "a b c"


NEUTRAL = {
    "n": 1,
    "tools": [],
    "tool_choice": "none",
    "logprobs": False,
    "top_logprobs": None,
    "response_format": {"type": "text"},
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "logit_bias": {},
    "stream": False,
    "stream_options": None,
    "user": "somebody",
    "metadata": {"a": "b"},
    "store": True,
    "service_tier": "auto",
    "modalities": ["text"],
    "safety_identifier": "x",
    "prompt_cache_key": "y",
    "parallel_tool_calls": True,
    "reasoning_effort": None,
}


@pytest.mark.parametrize(("field", "value"), NEUTRAL.items())
def test_values_that_change_nothing_are_accepted(field: str, value: object) -> None:
    assert ask(ScriptedEngine.saying("ok"), asking(**{field: value})).status_code == 200


def test_message_of_an_sdk_can_be_sent_back() -> None:
    sent = {"content": "a", "refusal": None, "role": "assistant", "annotations": None, "audio": None}
    sent |= {"function_call": None, "tool_calls": None}
    body = {"model": MODEL, "messages": [{"role": "user", "content": "q"}, sent, {"role": "user", "content": "r"}]}
    assert ask(ScriptedEngine.saying("ok"), body).status_code == 200


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=30), stop=st.lists(st.text(min_size=1, max_size=4), max_size=3))
def test_streamed_and_whole_text_are_the_same(text: str, stop: list[str]) -> None:
    engine = ScriptedEngine.saying(text)
    whole = ask(engine, asking(stop=stop)).json()
    streamed = events(ask(engine, asking(stop=stop, stream=True)).content)
    assert text_of(streamed) == whole["choices"][0]["message"]["content"]
    assert text.startswith(text_of(streamed))
    assert (text_of(streamed) == text) == (not any(mark in text for mark in stop))
    assert not any(mark in text_of(streamed) for mark in stop)
