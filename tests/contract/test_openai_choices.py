"""Several choices, log probabilities, stops in every form, and the reports a client may ask for."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from odmoe_server.engine_api import QueueFull
from support.http_app import DEADLINE_S, Wire, app_of, ask, asking, events, text_of
from support.scripted_engine import Gate, ScriptedEngine, tiny_tokenizer, words


def choices(engine: ScriptedEngine, **fields: Any) -> list[Any]:
    """Of a whole answer."""
    found: list[Any] = ask(engine, asking(**fields)).json()["choices"]
    return found


def streamed(engine: ScriptedEngine, **fields: Any) -> list[Any]:
    """The chunks of an answer, [DONE] looked at and taken away."""
    *chunks, done = events(ask(engine, asking(stream=True, **fields)).content)
    assert done == "[DONE]"
    return chunks


def test_the_generations_run_side_by_side() -> None:
    async def scenario() -> None:
        gate = Gate()
        engine = ScriptedEngine(script=[*words("a"), gate])
        client = Wire(app_of(engine), json.dumps(asking(n=3)).encode())
        task = client.start()
        await gate.reached.wait()
        await until(lambda: engine.open_generators == 3)
        client.hang_up()
        await task
        assert engine.open_generators == 0

    asyncio.run(asyncio.wait_for(scenario(), DEADLINE_S))


async def until(condition: Callable[[], bool]) -> None:
    """Let others run until it holds."""
    while not condition():
        await asyncio.sleep(0)


def test_n_choices_are_n_answers() -> None:
    engine = ScriptedEngine.saying("Hi")
    answer = ask(engine, asking(n=3)).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert {choice["message"]["content"] for choice in answer["choices"]} == {"Hi"}
    assert len({asked.request_id for asked in engine.requests}) == 3
    prompt = len(engine.requests[0].prompt_ids)
    assert answer["usage"]["prompt_tokens"] == prompt
    assert answer["usage"]["completion_tokens"] == 9
    assert answer["usage"]["total_tokens"] == prompt + 9


@pytest.mark.parametrize(("seed", "expected"), [(5, [5, 6, 7]), (2**63 - 2, [2**63 - 2, 2**63 - 1, -(2**63)])])
def test_each_choice_has_a_seed_of_its_own(seed: int, expected: list[int]) -> None:
    engine = ScriptedEngine.saying("Hi")
    choices(engine, n=3, seed=seed)
    assert [asked.sampling.seed for asked in engine.requests] == expected


def test_streamed_choices_keep_to_their_index() -> None:
    chunks = streamed(ScriptedEngine.saying("Hey"), n=3, stream_options={"include_usage": True})
    assert chunks.pop()["usage"]["completion_tokens"] == 12
    for index in range(3):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert not any("role" in choice["delta"] for choice in mine[1:])
        assert [choice["finish_reason"] for choice in mine] == [None] * 4 + ["stop"]
        assert text_of([{"choices": [choice]} for choice in mine]) == "Hey"


@pytest.mark.parametrize("stream", [True, False])
def test_if_one_choice_is_refused_none_is_answered(stream: bool) -> None:
    engine = ScriptedEngine(script=[QueueFull("full", retry_after_s=1)])
    assert ask(engine, asking(n=4, stream=stream)).status_code == 429
    assert engine.open_generators == 0


def logprobs_of(chunks: list[Any]) -> list[Any]:
    found = [choice["logprobs"] for chunk in chunks for choice in chunk["choices"] if choice["logprobs"]]
    return [entry for logprobs in found for entry in logprobs["content"]]


@pytest.mark.parametrize("wanted", [None, 0, 1, 20])
def test_logprobs(wanted: int | None) -> None:
    fields = {"logprobs": True} | ({} if wanted is None else {"top_logprobs": wanted})
    (choice,) = choices(ScriptedEngine.saying("aé🏔"), **fields)
    content = choice["logprobs"]["content"]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == "aé🏔"
    assert content[0] == {"token": "a", "logprob": -1.0, "bytes": [97], "top_logprobs": content[0]["top_logprobs"]}
    assert [len(entry["top_logprobs"]) for entry in content] == [wanted or 0] * 7
    assert all(other["logprob"] <= 0 for entry in content for other in entry["top_logprobs"])


def test_no_logprobs_unless_asked() -> None:
    assert choices(ScriptedEngine.saying("a"))[0]["logprobs"] is None


@settings(max_examples=40, deadline=None)
@given(text=st.text(max_size=20), stop=st.lists(st.text(min_size=1, max_size=3), max_size=2))
def test_streamed_logprobs_are_the_whole_ones_and_make_up_the_text(text: str, stop: list[str]) -> None:
    engine = ScriptedEngine.saying(text)
    (choice,) = choices(engine, logprobs=True, stop=stop)
    content = choice["logprobs"]["content"]
    assert logprobs_of(streamed(engine, logprobs=True, stop=stop)) == content
    # Characters are of several tokens, and a stop string begins with one of them: never a token too few.
    assert bytes(byte for entry in content for byte in entry["bytes"]) == choice["message"]["content"].encode()


def test_a_stop_string_may_be_shown_and_is_named() -> None:
    engine = ScriptedEngine.saying("one END two")
    (choice,) = choices(engine, stop=["nope", "END"], include_stop_str_in_output=True)
    assert choice["message"]["content"] == "one END"
    assert choice["stop_reason"] == "END"
    assert streamed(engine, stop="END")[-1]["choices"][0]["stop_reason"] == "END"
    assert "stop_reason" not in choices(engine, stop="nope")[0]


def test_stop_strings_wait_for_min_tokens() -> None:
    engine = ScriptedEngine.saying("a.b.c.d")
    assert choices(engine, stop=".", min_tokens=3)[0]["message"]["content"] == "a.b"
    assert engine.requests[0].sampling.min_tokens == 3


def test_special_tokens_are_shown_if_asked() -> None:
    end_id = tiny_tokenizer().convert_tokens_to_ids("<|im_end|>")
    engine = ScriptedEngine(script=[*words("a"), end_id, *words("b")])
    assert choices(engine, skip_special_tokens=False, ignore_eos=True)[0]["message"]["content"] == "a<|im_end|>b"
    (hidden,) = choices(engine, logprobs=True)
    assert hidden["message"]["content"] == "ab"
    assert [entry["token"] for entry in hidden["logprobs"]["content"]] == ["a", "b"]


def test_all_of_sampling_reaches_the_engine() -> None:
    engine = ScriptedEngine.saying("x")
    fields = {
        "top_k": 40,
        "min_p": 0.1,
        "presence_penalty": -2,
        "frequency_penalty": 1.5,
        "repetition_penalty": 1.1,
        "min_tokens": 2,
    }
    bias = {"logit_bias": {"7": -100, "3": 2.5}, "stop_token_ids": [1, 2]}
    ask(engine, asking(**fields, **bias, logprobs=True, top_logprobs=5))
    sampling = engine.requests[0].sampling
    assert {name: getattr(sampling, name) for name in fields} == fields
    assert sampling.logit_bias == ((7, -100), (3, 2.5))
    assert sampling.stop_token_ids == {1, 2}
    assert sampling.top_logprobs == 5


@pytest.mark.parametrize("off", [-1, 0])
def test_top_k_off(off: int) -> None:
    engine = ScriptedEngine.saying("x")
    assert ask(engine, asking(top_k=off)).status_code == 200
    assert engine.requests[0].sampling.top_k <= 0


METRICS = {
    "time_to_first_token_ms",
    "generation_time_ms",
    "queue_time_ms",
    "mean_itl_ms",
    "tokens_per_second",
}


def test_metrics_and_expert_stats_on_request() -> None:
    engine = ScriptedEngine.saying("Hello")
    answer = ask(engine, asking(return_metrics=True, return_expert_stats=True, n=2)).json()
    assert set(answer["metrics"]) == METRICS
    assert answer["metrics"]["queue_time_ms"] == 250
    assert answer["metrics"]["tokens_per_second"] > 0
    assert answer["expert_stats"]["activations"] == 12
    assert not {"metrics", "expert_stats"} & set(ask(engine).json())


def test_what_only_the_engine_knows_is_null_behind_a_stop_string() -> None:
    answer = ask(ScriptedEngine.saying("ab"), asking(stop="a", return_metrics=True, return_expert_stats=True)).json()
    assert answer["metrics"]["queue_time_ms"] is None
    assert answer["metrics"]["tokens_per_second"] is None
    assert answer["expert_stats"] is None


@pytest.mark.parametrize("usage", [True, False])
def test_reports_are_in_the_last_chunk(usage: bool) -> None:
    fields = {"stream_options": {"include_usage": True}} if usage else {}
    *chunks, last = streamed(ScriptedEngine.saying("Hello"), return_metrics=True, **fields)
    assert last["choices"] == []
    assert set(last["metrics"]) == METRICS
    assert ("usage" in last) == usage
    assert not any("metrics" in chunk for chunk in chunks)


def test_usage_in_every_chunk() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = streamed(ScriptedEngine.saying("abc"), stream_options=options)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [0, 1, 2, 3, 4, 4]
