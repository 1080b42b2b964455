"""What is told of tokens on request, over real routes and the real engine: log probabilities of prompts, ids, experts.

T tokens, L MoE layers, K experts a token.
"""

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi import FastAPI
from transformers import AutoModelForCausalLM

from odmoe_model.store import ExpertStore
from odmoe_server.engine.build import EngineOptions, ServingEngine
from support.cluster import local_cluster
from support.http_app import CHAT, MODEL, app_of, asking, events, request
from support.scripted_engine import tiny_tokenizer, words
from support.stores import tiny_store

PROMPT = "Once upon a time there was a prompt of three chunks"
PATH = "/v1/completions"
CHUNK = 16
NEAR = 1e-4  # chunks and eager's whole prompt round otherwise


@dataclass
class Served:
    app: FastAPI
    engine: ServingEngine
    checkpoint: Path

    def complete(self, **fields: Any) -> Any:
        body = {"model": MODEL, "prompt": PROMPT, "temperature": 0, **fields}
        return request(self.app, "POST", PATH, json=body)

    def choice(self, **fields: Any) -> Any:
        answer = self.complete(**fields)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("reading")
    size = len(tiny_tokenizer())
    store = ExpertStore.open(tiny_store("qwen3_moe", directory, vocab_size=size), verify=False)
    options = EngineOptions(endpoint=f"ipc://{directory}/server", prefill_chunk=CHUNK)
    with local_cluster(store, directory, slots=4, predictor=False, options=options) as cluster:
        yield Served(app_of(cluster.engine), cluster.engine, directory / "checkpoint")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def reference(served: Served) -> Any:
    model = AutoModelForCausalLM.from_pretrained(served.checkpoint)
    model.set_experts_implementation("eager")
    return model


@torch.inference_mode()
def expected_logprobs(reference: Any, ids: list[int]) -> torch.Tensor:
    """[T - 1, V]: of each token but the first."""
    logprobs: torch.Tensor = reference(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
    return logprobs


def test_log_probabilities_of_prompts_are_transformers_own(served: Served, reference: Any) -> None:
    ids = words(PROMPT)
    assert len(ids) > 3 * CHUNK
    expected_TV = expected_logprobs(reference, ids)
    first, *rest = served.choice(prompt_logprobs=3, max_tokens=2)["prompt_logprobs"]
    assert first is None
    for token_id, found, row_V in zip(ids[1:], rest, expected_TV, strict=True):
        assert found[str(token_id)]["logprob"] == pytest.approx(float(row_V[token_id]), abs=NEAR)
        assert found[str(token_id)]["rank"] == int((row_V > row_V[token_id]).sum()) + 1
        assert found[str(token_id)]["decoded_token"] == tiny_tokenizer().decode([token_id])
        best = row_V.topk(3)
        for rank, (likely, logprob) in enumerate(zip(best.indices.tolist(), best.values.tolist(), strict=True), 1):
            assert found[str(likely)]["rank"] == rank
            assert found[str(likely)]["logprob"] == pytest.approx(logprob, abs=NEAR)
        assert len(found) == 3 + (found[str(token_id)]["rank"] > 3)


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs_as_lm_eval_asks(served: Served, reference: Any, max_tokens: int, stream: bool) -> None:
    ids = words(PROMPT)
    fields = {"prompt": [ids], "echo": True, "logprobs": 1, "max_tokens": max_tokens, "seed": 1234, "stream": stream}
    answer = served.complete(**fields)
    if stream:
        chunks = [chunk["choices"][0] for chunk in events(answer.content) if isinstance(chunk, dict)]
        names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        logprobs = {name: [entry for chunk in chunks for entry in chunk["logprobs"][name]] for name in names}
        text = "".join(chunk["text"] for chunk in chunks)
    else:
        logprobs, text = answer.json()["choices"][0]["logprobs"], answer.json()["choices"][0]["text"]
        assert answer.json()["usage"]["completion_tokens"] == max_tokens
    assert text[: len(PROMPT)] == PROMPT
    assert {len(entries) for entries in logprobs.values()} == {len(ids) + max_tokens}
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert "".join(logprobs["tokens"][: len(ids)]) == PROMPT
    assert logprobs["text_offset"] == list(range(len(ids) + max_tokens))
    own = expected_logprobs(reference, ids).gather(1, torch.tensor(ids[1:]).unsqueeze(1))[:, 0]
    assert logprobs["token_logprobs"][1 : len(ids)] == pytest.approx(own.tolist(), abs=NEAR)
    # What lm-eval makes of it: whether what it asked about is what the model would have said.
    greedy = expected_logprobs(reference, ids).argmax(-1).tolist()
    for place in range(1, len(ids)):
        likeliest = max(logprobs["top_logprobs"][place].values())
        assert (logprobs["token_logprobs"][place] == likeliest) == (greedy[place - 1] == ids[place])


def test_the_token_that_ends_the_answer_has_its_place_in_echoed_logprobs(served: Served) -> None:
    """Or who leaves out the one token it had to ask for would leave out one of its own."""
    said = served.choice(max_tokens=1, return_token_ids=True)["token_ids"]
    choice = served.choice(max_tokens=1, echo=True, logprobs=1, stop_token_ids=said)
    assert (choice["text"], choice["finish_reason"]) == (PROMPT, "stop")
    assert len(choice["logprobs"]["tokens"]) == len(words(PROMPT)) + 1
    assert choice["logprobs"]["token_logprobs"][-1] == max(choice["logprobs"]["top_logprobs"][-1].values())


def test_reading_a_prompt_changes_nothing(served: Served) -> None:
    plain = served.choice(max_tokens=12, logprobs=2)
    read = served.choice(max_tokens=12, logprobs=2, prompt_logprobs=1, return_routed_experts=True)
    assert read["logprobs"] == plain["logprobs"]
    assert read["text"] == plain["text"]


def test_a_prompt_that_is_read_is_computed_anew(served: Served) -> None:
    def cached(**fields: Any) -> int:
        details = served.complete(max_tokens=1, **fields).json()["usage"]["prompt_tokens_details"]
        return int(details["cached_tokens"])

    cached()
    assert cached() == 3 * CHUNK
    assert cached(prompt_logprobs=0) == cached(return_routed_experts=True) == 0
    assert served.choice(max_tokens=1, prompt_logprobs=0)["prompt_logprobs"][1].keys() == {str(words(PROMPT)[1])}


@torch.inference_mode()
@pytest.mark.parametrize("stream", [False, True])
def test_routed_experts_are_what_the_gates_choose(served: Served, reference: Any, stream: bool) -> None:
    fields = {"max_tokens": 5, "return_routed_experts": True, "return_token_ids": True, "stream": stream}
    answer = served.complete(**fields)
    parts = events(answer.content) if stream else [answer.json()]
    choices = [part["choices"][0] for part in parts if isinstance(part, dict)]
    assert choices[0]["prompt_token_ids"] == words(PROMPT)
    ids = choices[0]["prompt_token_ids"] + [token_id for choice in choices for token_id in choice.get("token_ids", [])]
    assert [choice for choice in choices if "routed_experts" in choice] == choices[-1:]
    experts_TLK = np.load(io.BytesIO(base64.b64decode(choices[-1]["routed_experts"])), allow_pickle=False)
    assert experts_TLK.dtype == np.uint8
    assert len(ids) == len(words(PROMPT)) + 5
    gates = reference(torch.tensor([ids[:-1]]), output_router_logits=True).router_logits
    expected_TLK = torch.stack([logits_TE.topk(3).indices for logits_TE in gates], dim=1)
    assert np.array_equal(np.sort(experts_TLK, -1), expected_TLK.sort(-1).values.numpy())


def test_experts_also_where_a_stop_string_ended_the_answer(served: Served) -> None:
    plain = served.choice(max_tokens=8, return_token_ids=True)
    choice = served.choice(max_tokens=8, stop=plain["text"][-1], return_routed_experts=True, return_token_ids=True)
    num_rows = np.load(io.BytesIO(base64.b64decode(choice["routed_experts"]))).shape[0]
    assert num_rows == len(words(PROMPT)) + len(choice["token_ids"]) - 1


def test_token_ids_are_those_that_usage_counts(served: Served) -> None:
    asked = asking(temperature=0, max_completion_tokens=6, n=2, return_token_ids=True, prompt_logprobs=0)
    whole = request(served.app, "POST", CHAT, json=asked).json()
    assert len(whole["prompt_token_ids"]) == len(whole["prompt_logprobs"]) == whole["usage"]["prompt_tokens"]
    assert [len(choice["token_ids"]) for choice in whole["choices"]] == [6, 6]
    ended_by = whole["choices"][0]["token_ids"][3]
    asked = {**asked, "stop_token_ids": [ended_by], "prompt_logprobs": None, "n": 1}
    short = request(served.app, "POST", CHAT, json=asked).json()
    ids = short["choices"][0]["token_ids"]
    assert (ids[-1], len(ids)) == (ended_by, short["usage"]["completion_tokens"])
    parts = events(request(served.app, "POST", CHAT, json={**asked, "stream": True}).content)
    chunks = [part for part in parts if isinstance(part, dict)]
    assert [chunk.get("prompt_token_ids") for chunk in chunks] == [whole["prompt_token_ids"]] + [None] * (
        len(chunks) - 1
    )
    assert [token_id for chunk in chunks for token_id in chunk["choices"][0].get("token_ids", [])] == ids


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (PATH, {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        (PATH, {"prompt_logprobs": 21}, "prompt_logprobs"),
        (PATH, {"prompt_logprobs": -1}, "prompt_logprobs"),
        (PATH, {"prompt_logprobs": 20, "prompt": [[1] * 400] * 12}, "prompt_logprobs"),
        (PATH, {"echo": True, "logprobs": 20, "prompt": [[1] * 400] * 12}, "echo"),
        (PATH, {"return_routed_experts": True, "prompt": [[1] * 400] * 21}, "return_routed_experts"),
        (PATH, {"max_tokens": 0}, "max_tokens"),
        (CHAT, {"max_tokens": 0}, "max_tokens"),
    ],
)
def test_what_cannot_be_told_is_refused(served: Served, path: str, fields: dict[str, Any], param: str) -> None:
    body = asking(**fields) if path == CHAT else {"model": MODEL, "prompt": "a", **fields}
    answer = request(served.app, "POST", path, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_logits_of_prompts_count_as_memory(served: Served) -> None:
    """One chunk of them, where the budget has room; else the request is refused rather than left to wait for ever."""
    loop = served.engine
    loaded = loop._loaded
    assert loaded is not None
    size, length = loaded.kv_size, len(words(PROMPT)) + 1
    assert size.logits_row == 4 * len(tiny_tokenizer())
    keys_bytes, reading_bytes = size.bytes_for(length), CHUNK * size.logits_row
    for budget_bytes, status in ((keys_bytes + reading_bytes, 200), (keys_bytes + reading_bytes - 1, 400)):
        loop._loaded = replace(loaded, kv_budget_bytes=budget_bytes)
        loop._room.budget_bytes = budget_bytes
        try:
            answer = served.complete(prompt_logprobs=0, max_tokens=1)
            plain = served.complete(max_tokens=1)
        finally:
            loop._loaded, loop._room.budget_bytes = loaded, loaded.kv_budget_bytes
        assert (answer.status_code, plain.status_code) == (status, 200), answer.text
    assert answer.json()["error"]["code"] == "too_large"
    assert "'prompt_logprobs'" in answer.json()["error"]["message"]
