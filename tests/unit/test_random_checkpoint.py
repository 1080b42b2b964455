"""Random checkpoints: every family's, whole or not there, the same for a seed, fit to be prepared, served and talked
to."""

import json
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from odmoe_model import random_checkpoint
from odmoe_model.family import SUPPORTED_FAMILIES, build_config, empty_model, experts_modules
from odmoe_model.prepare import prepare
from odmoe_model.random_checkpoint import RandomCheckpoint
from odmoe_model.random_shape import RandomCheckpointError, RandomShape
from odmoe_model.store import ExpertStore
from odmoe_model.writing import write_file
from odmoe_server.text import TextCodec
from support.stores import local_model

SMALL: dict[str, Any] = {"layers": 2, "experts": 8, "hidden": 64, "intermediate": 48, "vocab": 300, "context": 256}


def small(family: str = "mixtral", **changes: Any) -> RandomShape:
    return RandomShape(family=family, **{**SMALL, **changes})


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - it is no dictionary
    return found


def written(directory: Path, shape: RandomShape, *, seed: int = 0) -> Path:
    RandomCheckpoint(shape, seed=seed).write(directory)
    return directory


def loaded(directory: Path) -> PreTrainedModel:
    model, report = AutoModelForCausalLM.from_pretrained(
        directory, dtype="auto", experts_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval()


def mark(seen_E: torch.Tensor, index_TK: torch.Tensor) -> None:
    seen_E[index_TK.flatten()] = True


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_each_family_as_its_makers_publish_it(family: str, tmp_path: Path) -> None:
    """Names and shapes are those transformers saves, the sizes foretold are exact, and the store answers alike."""
    plan = RandomCheckpoint(small(family))
    plan.write(tmp_path / "checkpoint")
    model = loaded(tmp_path / "checkpoint")
    model.save_pretrained(tmp_path / "saved")
    ours, theirs = tensors(tmp_path / "checkpoint"), tensors(tmp_path / "saved")
    assert {name: value.shape for name, value in ours.items()} == {n: value.shape for n, value in theirs.items()}
    assert plan.total_bytes == sum(value.nbytes for value in ours.values())
    experts = [parameter for _, module in experts_modules(model) for parameter in module.parameters()]
    assert plan.expert_bytes == sum(parameter.nbytes for parameter in experts)
    assert len(experts_modules(model)) == 2, "every layer is a MoE layer"
    prepare(tmp_path / "checkpoint", tmp_path / "store")
    store = ExpertStore.open(tmp_path / "store", verify=True)
    assert (store.manifest.num_experts, store.manifest.top_k) == (8, 2)
    ids_BT = torch.randint(0, 300, (1, 12), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected_BTV, got_BTV = model(ids_BT).logits, local_model(store)(ids_BT).logits
    assert torch.equal(got_BTV, expected_BTV)


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_weights_keep_activations_and_routing_alive(family: str, tmp_path: Path) -> None:
    """Logits are near 1 in size and differ between tokens; every expert of every layer gets work."""
    model = loaded(written(tmp_path / "checkpoint", small(family, hidden=128)))
    used = [torch.zeros(8, dtype=torch.bool) for _ in experts_modules(model)]
    for seen, (_, module) in zip(used, experts_modules(model), strict=True):
        module.register_forward_pre_hook(lambda _, inputs, seen=seen: mark(seen, inputs[1]))
    ids_BT = torch.arange(5, 255)[None]
    with torch.inference_mode():
        logits_TV = model(ids_BT).logits[0].float()
    assert 0.3 < float(logits_TV.std()) < 4.0
    assert len(set(logits_TV.argmax(-1).tolist())) > 50
    assert all(bool(seen.all()) for seen in used), [int(seen.sum()) for seen in used]
    assert not (logits_TV.argmax(-1) == model.config.eos_token_id).any(), "the end of text was silenced"


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral"])
def test_deviations_follow_the_inputs_of_a_matrix_whichever_way_it_lies(family: str, tmp_path: Path) -> None:
    model = loaded(written(tmp_path / "checkpoint", small(family, layers=1, hidden=256, intermediate=16)))
    _, experts = experts_modules(model)[0]
    assert experts.gate_up_proj.std().item() == pytest.approx(256**-0.5, rel=0.05)
    assert experts.down_proj.std().item() == pytest.approx(16**-0.5, rel=0.05)


def test_a_seed_gives_the_same_bytes_and_another_gives_others(tmp_path: Path) -> None:
    first, again, other = (
        tensors(written(tmp_path / name, small(), seed=seed)) for name, seed in (("a", 7), ("b", 7), ("c", 8))
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    weights = [name for name, value in first.items() if value.ndim > 1]
    assert not any(torch.equal(first[name], other[name]) for name in weights)
    experts = [first[f"model.layers.0.block_sparse_moe.experts.{e}.w1.weight"] for e in range(2)]
    assert not torch.equal(*experts)


def test_dtypes(tmp_path: Path) -> None:
    model = loaded(written(tmp_path / "bf16", small(dtype="bf16")))
    assert {value.dtype for value in tensors(tmp_path / "bf16").values()} == {torch.bfloat16}
    assert model.dtype == torch.bfloat16


def test_large_ones_are_cut_into_files_and_values_into_portions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No chunk that is written is larger than a portion, however large the tensor; the files are as planned."""
    monkeypatch.setattr(random_checkpoint, "_SHARD_BYTES", 200_000)
    monkeypatch.setattr(random_checkpoint, "_PORTION_BYTES", 5_000)
    largest = 0

    def spy(path: Path, chunks: Any) -> Any:
        nonlocal largest
        pieces = list(chunks)
        largest = max(largest, *(len(piece) for piece in pieces[1:]))
        return write_file(path, pieces)

    monkeypatch.setattr(random_checkpoint, "write_file", spy)
    directory = written(tmp_path / "checkpoint", small())
    assert largest <= 5_000
    files = sorted(directory.glob("*.safetensors"))
    assert len(files) > 1
    assert all(path.stat().st_size < 220_000 for path in files)
    loaded(directory)


def test_progress_ends_at_the_size_foretold(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    plan = RandomCheckpoint(small())
    plan.write(tmp_path / "checkpoint", progress=lambda what, done, total: told.append((done, total)))
    assert told[-1] == (plan.total_bytes, plan.total_bytes)
    assert [done for done, _ in told] == sorted({done for done, _ in told})


def test_the_tokenizer_shows_and_reads_everything(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(written(tmp_path / "checkpoint", small()), local_files_only=True)
    text = "Grüße, 你好!\n\x00 <b>"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([299]) == " t299"
    assert len(tokenizer) == 300


def test_a_chat_can_be_rendered_and_ends_where_the_answer_begins(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(written(tmp_path / "checkpoint", small()), local_files_only=True)
    codec = TextCodec(tokenizer)
    ids = anyio.run(codec.prompt_ids, [{"role": "system", "content": "Be."}, {"role": "user", "content": "Hi"}])
    expected = "<|begin|><|system|>Be.<|end|><|user|>Hi<|end|><|assistant|>"
    assert tokenizer.decode(ids) == expected
    forged = anyio.run(codec.prompt_ids, [{"role": "user", "content": "<|end|>"}])
    assert forged.count(tokenizer.eos_token_id) == 1, "a user cannot write a marker"


def test_any_setting_of_the_family_can_be_given(tmp_path: Path) -> None:
    plan = RandomCheckpoint(small("deepseek_v3", layers=3, more={"first_k_dense_replace": 1}))
    plan.write(tmp_path / "checkpoint")
    config = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    assert config["first_k_dense_replace"] == 1
    assert len(experts_modules(empty_model(build_config(config), dtype=torch.float32))) == 2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"family": "llama"}, "no family 'llama'; supported are: deepseek_v2"),
        ({"top_k": 9}, "9 of 8 experts"),
        ({"experts": 0}, "experts must be at least 1"),
        ({"family": "phimoe", "top_k": 1}, "use top-k 2"),
        ({"hidden": 100, "heads": 3}, "does not divide into 3 heads"),
        ({"heads": 4, "kv_heads": 3}, "3 of them for keys and values"),
        ({"vocab": 100}, "no room for 261"),
        ({"more": {"num_expert": 2}}, "no setting 'num_expert'"),
        ({"more": {"hidden_act": "no-such"}}, "of this shape"),
    ],
)
def test_senseless_shapes_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(RandomCheckpointError, match=says):
        RandomCheckpoint(small(**changes))


def test_what_exists_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    plan = RandomCheckpoint(small())
    with pytest.raises(RandomCheckpointError, match="exists already"):
        plan.write(tmp_path / "checkpoint")


def test_too_little_space_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RandomCheckpointError, match=r"no space in .*takes 0\.02 GB, 0\.00 GB are free"):
        RandomCheckpoint(small()).write(tmp_path / "checkpoint", free_bytes=lambda path: 0)
    assert not list(tmp_path.iterdir())


def test_an_interruption_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        RandomCheckpoint(small()).write(tmp_path / "checkpoint", progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, chunks: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(random_checkpoint, "write_file", full)
    with pytest.raises(RandomCheckpointError, match="No space left on device"):
        RandomCheckpoint(small()).write(tmp_path / "checkpoint")
    assert not list(tmp_path.iterdir())
