"""POST /v1/completions, /tokenize and /detokenize: prompts in every form, what comes back, what is refused."""

from typing import Any

import httpx
import pytest

from odmoe_server.limits import ServiceLimits
from odmoe_server.openai.fields import COMPLETION_FIELDS
from support.http_app import ALIAS, MODEL, app_of, events, request
from support.scripted_engine import ScriptedEngine, tiny_tokenizer, words

PATH = "/v1/completions"


def complete(engine: ScriptedEngine, prompt: Any = "Once", limits: ServiceLimits | None = None, **fields: Any) -> Any:
    """The answer to a request for text."""
    body = {"model": MODEL, "prompt": prompt, **fields}
    return request(app_of(engine, limits=limits), "POST", PATH, json=body)


def error_of(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error


def test_the_body_is_what_openai_sends() -> None:
    engine = ScriptedEngine.saying(" upon")
    body = complete(engine).json()
    assert body.pop("id").startswith("cmpl-")
    assert body.pop("created") > 0
    assert body == {
        "object": "text_completion",
        "model": MODEL,
        "system_fingerprint": "odmoe_0123456789ab",
        "choices": [{"index": 0, "text": " upon", "logprobs": None, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": 4,
            "completion_tokens": 6,
            "total_tokens": 10,
            "prompt_tokens_details": {"cached_tokens": 3},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
    }


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("ab", [words("ab")]),
        (["ab", "c"], [words("ab"), words("c")]),
        ([1, 2, 3], [[1, 2, 3]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_all_forms_of_prompts_with_n(prompt: Any, ids: list[list[int]]) -> None:
    engine = ScriptedEngine.saying("x")
    body = complete(engine, prompt, n=2, seed=7).json()
    assert [list(asked.prompt_ids) for asked in engine.requests] == [each for each in ids for _ in range(2)]
    assert [asked.sampling.seed for asked in engine.requests] == [7, 8] * len(ids)
    assert [choice["index"] for choice in body["choices"]] == list(range(2 * len(ids)))
    assert body["usage"]["prompt_tokens"] == sum(map(len, ids))
    assert body["usage"]["completion_tokens"] == 2 * 2 * len(ids)


def test_sixteen_tokens_unless_told() -> None:
    engine = ScriptedEngine.saying("x" * 100)
    assert complete(engine).json()["usage"]["completion_tokens"] == 16
    assert complete(engine, max_tokens=40).json()["usage"]["completion_tokens"] == 40


@pytest.mark.parametrize("prompt", ["Once", words("Once")])
def test_echo(prompt: Any) -> None:
    engine = ScriptedEngine.saying(" upon")
    assert complete(engine, prompt, echo=True).json()["choices"][0]["text"] == "Once upon"
    chunks = events(complete(engine, prompt, echo=True, stream=True).content)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == "Once upon"


def test_streamed_prompts_keep_to_their_index() -> None:
    options = {"include_usage": True}
    *chunks, usage, done = events(
        complete(ScriptedEngine.saying("Hi"), ["a", "b"], n=2, stream=True, stream_options=options).content
    )
    assert done == "[DONE]"
    assert usage["usage"]["total_tokens"] == 2 + 4 * 3
    for index in range(4):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in mine) == "Hi"
        assert [choice["finish_reason"] for choice in mine] == [None, None, "stop"]


def test_logprobs() -> None:
    engine = ScriptedEngine.saying("aé")
    whole = complete(engine, logprobs=2).json()["choices"][0]["logprobs"]
    assert whole["tokens"][0] == "a"
    assert whole["token_logprobs"] == [-1.0] * 3
    assert whole["text_offset"][:2] == [0, 1]
    assert [len(top) for top in whole["top_logprobs"]] == [3, 3, 3]  # the chosen one is among them
    chunks = events(complete(engine, logprobs=2, stream=True).content)[:-1]
    streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    for name in ("tokens", "token_logprobs", "top_logprobs"):
        assert [entry for logprobs in streamed for entry in logprobs[name]] == whole[name]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [1, -1]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": {"text": "a"}}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": [[1], [10**30]]}, "prompt"),
        ({"prompt": "x" * 600}, "prompt"),
        ({"prompt": ["a"] * 33, "n": 2}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "the end"}, "suffix"),
        ({"messages": []}, "messages"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], param: str) -> None:
    engine = ScriptedEngine.saying("must not be asked")
    assert error_of(complete(engine, **fields))["param"] == param
    assert engine.requests == []


@pytest.mark.parametrize("field", COMPLETION_FIELDS)
def test_every_known_field_is_refused_by_name(field: str) -> None:
    engine = ScriptedEngine.saying("ok")
    error = error_of(complete(engine, **{field: {"some": "thing"}}))
    assert (error["param"], error["code"]) == (field, "unsupported_parameter")
    assert engine.requests == []
    for neutral in (None, *COMPLETION_FIELDS[field]):
        assert complete(engine, **{field: neutral}).status_code == 200


def post(path: str, **body: Any) -> httpx.Response:
    return request(app_of(ScriptedEngine()), "POST", path, json=body)


def test_tokenize_in_both_dialects() -> None:
    ids = words("Hé")
    found = post("/tokenize", model=ALIAS, prompt="Hé").json()
    assert found == {"tokens": ids, "count": 3, "max_model_len": 512}
    assert post("/tokenize", content="Hé").json()["tokens"] == ids


def test_tokenize_a_conversation() -> None:
    messages = [{"role": "user", "content": "x"}]
    whole = post("/tokenize", messages=messages).json()["tokens"]
    assert tiny_tokenizer().decode(whole) == "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
    without = post("/tokenize", messages=messages, add_generation_prompt=False).json()["tokens"]
    assert whole[: len(without)] == without
    assert len(without) < len(whole)


def test_tokenize_with_the_tokens_texts() -> None:
    assert post("/tokenize", prompt="ab", return_token_strs=True).json()["token_strs"] == ["a", "b"]


def test_detokenize_speaks_both_dialects() -> None:
    found = post("/detokenize", model=MODEL, tokens=words("Hé 🏔")).json()
    assert found == {"prompt": "Hé 🏔", "content": "Hé 🏔"}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "content": "b"}, "content"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"content": "a", "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"prompt": "a", "add_special": True}, "add_special"),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt"),
        ("/tokenize", {"content": "a", "with_pieces": True}, "with_pieces"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [{"role": "system", "content": "a"}] * 2}, "messages"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": [10**6]}, "tokens"),
    ],
)
def test_wrong_tokens(path: str, body: dict[str, Any], param: str) -> None:
    assert error_of(post(path, **body))["param"] == param


@pytest.mark.parametrize(("path", "body"), [("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": []})])
def test_tokens_of_an_unknown_model(path: str, body: dict[str, Any]) -> None:
    assert error_of(post(path, model="other", **body), 404)["code"] == "model_not_found"
