"""The resident run is plain transformers: its weights, its answers, its implementations; in this process, tiny."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from odmoe_model.prepare import prepare
from odmoe_model.store import ExpertStore
from odmoe_server.bench.resident import IMPLEMENTATIONS, Job, Measured, Resident, load_resident, measure, share
from support.reference import reference_tokens
from support.tiny import tiny_checkpoint

PROMPT = [5, 9, 2, 7]
TOKENS = 6


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("resident")
    tiny_checkpoint("mixtral", directory / "checkpoint")
    prepare(directory / "checkpoint", directory / "store")
    return directory / "checkpoint", directory / "store"


def job(**changes: object) -> Job:
    told: dict[str, object] = {"store": "", "prompts": [PROMPT], "first_prompts": [PROMPT, PROMPT], "tokens": TOKENS}
    return Job(**{**told, "implementations": list(IMPLEMENTATIONS), **changes})  # type: ignore[arg-type]


def test_every_weight_is_as_from_pretrained_makes_it(places: tuple[Path, Path]) -> None:
    checkpoint, store = places
    expected = AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    found = load_resident(ExpertStore.open(store, verify=False)).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_its_answer_is_that_of_generate(places: tuple[Path, Path]) -> None:
    checkpoint, store = places
    model = load_resident(ExpertStore.open(store, verify=False))
    model.set_experts_implementation("eager")
    answer, first_s = Resident(model).answer(PROMPT, tokens=TOKENS)
    assert answer.tokens == reference_tokens(checkpoint, PROMPT, TOKENS)
    assert answer.decode_s > 0
    assert first_s > 0


def test_each_implementation_is_measured(places: tuple[Path, Path]) -> None:
    model = load_resident(ExpertStore.open(places[1], verify=False))
    found = measure(job(), model, expert_bytes=1000, top_k=2)
    assert [measured.implementation for measured in found] == list(IMPLEMENTATIONS)
    assert all(len(m.answers) == 1 and len(m.first_s) == 2 and not m.reason for m in found)
    assert all(len(answer.tokens) == TOKENS for m in found for answer in m.answers)


def test_an_implementation_that_would_copy_too_much_is_not_given_the_long_prompts(places: tuple[Path, Path]) -> None:
    model = load_resident(ExpertStore.open(places[1], verify=False))
    eager, batched, _ = measure(job(), model, expert_bytes=10**9, top_k=2)
    assert (len(eager.first_s), batched.first_s) == (2, [])
    assert "8.0 GB" in batched.reason
    assert batched.answers


def test_an_implementation_that_transformers_has_not_says_so(places: tuple[Path, Path]) -> None:
    model = load_resident(ExpertStore.open(places[1], verify=False))
    (found,) = measure(job(implementations=["no-such"]), model, expert_bytes=1, top_k=2)
    assert not found.answers
    assert "no-such" in found.reason


def test_a_layers_time_is_that_of_its_experts_and_the_rest(places: tuple[Path, Path]) -> None:
    model = load_resident(ExpertStore.open(places[1], verify=False))
    main_s, expert_s = share(model, PROMPT, tokens=TOKENS, top_k=2)
    assert main_s > 0
    assert expert_s > 0


def test_the_first_token_is_not_counted_as_decoding() -> None:
    from odmoe_server.bench.resident import Decoded

    assert Measured(implementation="eager", answers=[Decoded(tokens=[1, 2, 3], decode_s=0.5)]).tokens_per_s == [4.0]
