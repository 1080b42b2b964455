"""What an answer is made of, in vLLM's, SGLang's and llama.cpp's words, over real routes and the real engine."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fastapi import FastAPI

from odmoe_model.store import ExpertStore
from odmoe_server.engine.build import EngineOptions
from support.cluster import local_cluster
from support.http_app import CHAT, MODEL, app_of, asking, events, request
from support.scripted_engine import tiny_tokenizer, words
from support.stores import tiny_store

TEXTS = "/v1/completions"
PAGE = "The head of a prompt that comes again, "
CHUNK = 16
END_ID = int(tiny_tokenizer().eos_token_id)
DIGITS = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
GBNF = 'root ::= "yes" | "no"\n\n'
LARK = '%llguidance {}\nstart: "yes" | "no"'


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastAPI]:
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("bounded")
    size = len(tiny_tokenizer())
    store = ExpertStore.open(tiny_store("qwen3_moe", directory, vocab_size=size), verify=False)
    options = EngineOptions(endpoint=f"ipc://{directory}/server", prefill_chunk=CHUNK)
    with local_cluster(store, directory, slots=4, predictor=False, options=options) as cluster:
        yield app_of(cluster.engine)  # type: ignore[arg-type]


def answered(app: FastAPI, path: str = CHAT, **fields: Any) -> Any:
    # The tiny model knows no end of its own.
    body = {"max_tokens": 40, "temperature": 1, "seed": 1, "stop_token_ids": [END_ID], **fields}
    body = asking(**body) if path == CHAT else {"model": MODEL, "prompt": PAGE, **body}
    answer = request(app, "POST", path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def said(app: FastAPI, path: str = CHAT, **fields: Any) -> str:
    (choice,) = answered(app, path, **fields)["choices"]
    assert choice["finish_reason"] == "stop"
    text: str = choice["message"]["content"] if path == CHAT else choice["text"]
    return text


@pytest.mark.parametrize(
    "fields",
    [
        {"structured_outputs": {"json": DIGITS}},
        {"structured_outputs": {"json": json.dumps(DIGITS), "disable_fallback": True}},
        {"guided_json": DIGITS},
        {"json_schema": json.dumps(DIGITS)},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": DIGITS}}},
    ],
    ids=str,
)
@pytest.mark.parametrize("path", [CHAT, TEXTS])
def test_json_of_a_schema(app: FastAPI, path: str, fields: dict[str, Any]) -> None:
    assert json.loads(said(app, path, **fields)) in ({"a": 1}, {"a": 2})


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"structured_outputs": {"regex": "[0-9]{3}/x"}}, "[0-9]{3}/x"),
        ({"guided_regex": "[ab]{5}"}, "[ab]{5}"),
        ({"regex": "é🏔?"}, "é🏔?"),
        ({"structured_outputs": {"choice": ["é🏔", 'a"\n']}}, 'é🏔|a"\n'),
        ({"guided_choice": ["Berlin"]}, "Berlin"),
        ({"guided_grammar": LARK}, "yes|no"),
        ({"structured_outputs": {"grammar": GBNF}}, "yes|no"),
        ({"grammar": GBNF}, "yes|no"),
        ({"ebnf": GBNF}, "yes|no"),
    ],
    ids=str,
)
@pytest.mark.parametrize("path", [CHAT, TEXTS])
def test_text_of_a_form(app: FastAPI, path: str, fields: dict[str, Any], pattern: str) -> None:
    assert re.fullmatch(pattern, said(app, path, **fields))


def test_any_object(app: FastAPI) -> None:
    bias = {str(words("}")[0]): 100}
    assert said(app, structured_outputs={"json_object": True}, logit_bias=bias) == "{}"


def test_an_answer_of_few_tokens(app: FastAPI) -> None:
    choice = answered(app, allowed_token_ids=words("ab"), n=2)["choices"]
    assert [set(each["message"]["content"]) <= set("ab") for each in choice] == [True, True]
    assert [each["finish_reason"] for each in choice] == ["length", "length"]
    assert said(app, TEXTS, allowed_token_ids=[END_ID, END_ID]) == ""


def test_words_that_must_not_be(app: FastAPI) -> None:
    allowed = {str(token): 100 for token in words("ab ")}
    drawn = {"logit_bias": allowed, "max_tokens": 60, "ignore_eos": True}
    free = answered(app, **drawn)["choices"][0]["message"]["content"]
    assert "aa" in free
    assert "b" in free
    held = answered(app, **drawn, bad_words=["aa", "b"])["choices"][0]["message"]["content"]
    assert "aa" not in held
    assert "b" not in held
    assert set(held) == set("a ")
    # At the very beginning, too.
    (first,) = words("a")
    twice = {"logit_bias": {str(first): 100}, "temperature": 0, "max_tokens": 2}
    assert answered(app, **twice)["choices"][0]["message"]["content"] == "aa"
    assert answered(app, **twice, bad_words=["aa"])["choices"][0]["message"]["content"] != "aa"


def cached(app: FastAPI, **fields: Any) -> int:
    found: int = answered(app, TEXTS, max_tokens=1, **fields)["usage"]["prompt_tokens_details"]["cached_tokens"]
    return found


def test_a_salt_keeps_prompts_apart(app: FastAPI) -> None:
    asked = {"prompt": "Said with salt and said without: " + "x" * CHUNK}
    assert [cached(app, **asked, cache_salt=salt) for salt in ("mine", "theirs", None)] == [0, 0, 0]
    assert [cached(app, **asked, cache_salt=salt) for salt in ("mine", "theirs", None)] == [3 * CHUNK] * 3


@pytest.mark.parametrize("path", [CHAT, TEXTS])
def test_the_end_of_a_prompt(app: FastAPI, path: str) -> None:
    asked = {"return_token_ids": True, "max_tokens": 1}
    whole, part = answered(app, path, **asked), answered(app, path, **asked, truncate_prompt_tokens=7)
    assert part["usage"]["prompt_tokens"] == 7
    assert _prompt(part) == _prompt(whole)[-7:]
    assert _prompt(answered(app, path, **asked, truncate_prompt_tokens=10**6)) == _prompt(whole)


def _prompt(answer: Any) -> list[int]:
    ids: list[int] = (answer if "prompt_token_ids" in answer else answer["choices"][0])["prompt_token_ids"]
    return ids


def test_a_form_in_a_stream_of_several_choices(app: FastAPI) -> None:
    body = asking(
        guided_choice=["left", "right"], n=3, stream=True, logprobs=True, max_tokens=20, stop_token_ids=[END_ID]
    )
    *chunks, done = events(request(app, "POST", CHAT, json=body).content)
    assert done == "[DONE]"
    texts = ["", "", ""]
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content") or ""
    assert set(texts) <= {"left", "right"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"xml": "a"}}, "structured_outputs.xml"),
        ({"guided_json": "[1]"}, "guided_json"),
        ({"guided_json": 1}, "guided_json"),
        ({"json_schema": {"type": "banana"}}, "json_schema"),
        ({"json_schema": {"type": "object", "dependentSchemas": {}}}, "json_schema"),
        ({"regex": "("}, "regex"),
        ({"regex": ""}, "regex"),
        ({"regex": "a" * 5000}, "regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": [""]}, "guided_choice[0]"),
        ({"guided_choice": ["a"] * 257}, "guided_choice"),
        ({"grammar": ""}, "grammar"),
        ({"grammar": "root ::= other"}, "grammar"),
        ({"ebnf": "start: ((("}, "ebnf"),
        ({"ebnf": "root ::= " + "(" * 16_000}, "ebnf"),
        ({"guided_grammar": "a\n" * 20_000}, "guided_grammar"),
        ({"guided_regex": "a", "grammar": GBNF}, "grammar"),
        ({"regex": "a", "response_format": {"type": "json_object"}}, "regex"),
        ({"regex": "a", "min_tokens": 3}, "min_tokens"),
        ({"grammar": GBNF, "ignore_eos": True}, "ignore_eos"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [10**6]}, "allowed_token_ids"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids"),
        ({"allowed_token_ids": [END_ID], "min_tokens": 1}, "allowed_token_ids"),
        ({"allowed_token_ids": [1], "regex": "a"}, "allowed_token_ids"),
        ({"allowed_token_ids": [1], "bad_words": ["a"]}, "bad_words"),
        ({"bad_words": ["a"], "guided_choice": ["a"]}, "bad_words"),
        ({"bad_words": [""]}, "bad_words[0]"),
        ({"bad_words": "a"}, "bad_words"),
        ({"bad_words": ["a"] * 65}, "bad_words"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": -1}, "truncate_prompt_tokens"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"cache_salt": "x" * 257}, "cache_salt"),
    ],
    ids=lambda value: str(value)[:60],
)
@pytest.mark.parametrize("path", [CHAT, TEXTS])
def test_what_is_refused(app: FastAPI, path: str, fields: dict[str, Any], param: str) -> None:
    body = asking(**fields) if path == CHAT else {"model": MODEL, "prompt": "x", **fields}
    answer = request(app, "POST", path, json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param, answer.text
