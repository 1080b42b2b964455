"""Each family: skeleton, store, seam and expert maths together equal plain transformers, eager, to the last bit.

No family's eager implementation sums in another order than ours (ascending experts), so there is no exception.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from odmoe_model.family import SUPPORTED_FAMILIES, experts_modules
from odmoe_model.prepare import prepare
from odmoe_model.store import ExpertStore
from support.stores import local_model
from support.tiny import FAMILIES, tiny_model

PROMPTS = [[1, 5, 9, 77, 33, 3, 2, 8, 100, 64, 31], [17, 120, 4]]
NUM_TOKENS = 32
CASES = [(family, torch.float32) for family in FAMILIES] + [
    (family, torch.bfloat16) for family in ("mixtral", "gpt_oss", "deepseek_v3", "ernie4_5_moe")
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{str(case[1])[6:]}")
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """(plain transformers model of a sharded checkpoint, ours out of its store, the store)."""
    family, dtype = request.param
    directory: Path = tmp_path_factory.mktemp(family)
    tiny_model(family).to(dtype).save_pretrained(directory / "checkpoint", max_shard_size="300KB")
    prepare(directory / "checkpoint", directory / "store")
    store = ExpertStore.open(directory / "store", verify=True)
    plain = AutoModelForCausalLM.from_pretrained(directory / "checkpoint", dtype="auto")
    plain.set_experts_implementation("eager")
    return plain, local_model(store), store


def test_all_supported_families_are_covered():
    assert set(FAMILIES) == set(SUPPORTED_FAMILIES)


def test_weights_and_buffers_equal_from_pretrained(models):
    plain, ours, store = models
    expected = {**plain.state_dict(), **dict(plain.named_buffers())}
    actual = {**ours.state_dict(), **dict(ours.named_buffers())}
    assert actual.keys() == expected.keys()
    for layer, (path, module) in enumerate(experts_modules(plain)):
        for name, parameter in module.named_parameters():
            for expert in range(store.manifest.num_experts):
                field = store.fields(store.record(layer, expert))[name]
                assert field.dtype == parameter.dtype
                assert torch.equal(field, parameter[expert])
            expected.pop(f"{path}.{name}")
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def test_skeleton_is_set_up_as_from_pretrained_does(models):
    plain, ours, _ = models
    assert all(parameter.is_meta for _, module in experts_modules(ours) for parameter in module.parameters())
    assert not ours.training
    assert ours.config._attn_implementation == plain.config._attn_implementation
    assert ours.generation_config.to_diff_dict() == plain.generation_config.to_diff_dict()
    tied = plain.get_input_embeddings().weight is plain.get_output_embeddings().weight
    assert (ours.get_input_embeddings().weight is ours.get_output_embeddings().weight) == tied


@pytest.mark.parametrize("prompt", PROMPTS, ids=["long", "short"])
def test_logits_and_greedy_tokens_are_bit_identical(models, prompt: list[int]):
    plain, ours, _ = models
    expected, actual = _greedy(plain, prompt), _greedy(ours, prompt)
    assert actual.sequences.tolist() == expected.sequences.tolist()
    assert len(set(expected.sequences[0, len(prompt) :].tolist())) > 4, "degenerate reference"
    for step, (want, got) in enumerate(zip(expected.logits, actual.logits, strict=True)):
        assert torch.equal(got, want), f"step {step}"


def _greedy(model: PreTrainedModel, prompt: list[int]):
    return model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
