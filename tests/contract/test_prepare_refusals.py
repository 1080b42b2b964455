"""What `prepare` refuses, and that it says what is wrong, what to do, and leaves nothing behind."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from odmoe_model.prepare import PrepareError, prepare
from support.tiny import tiny_checkpoint, tiny_model

SHARD = "model-00001-of-"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sharded") / "checkpoint"
    tiny_model("mixtral", num_hidden_layers=2).save_pretrained(directory, max_shard_size="300KB")
    return directory


@pytest.fixture
def source(sharded: Path, tmp_path: Path) -> Path:
    """A good sharded mixtral checkpoint to spoil."""
    return Path(shutil.copytree(sharded, tmp_path / "checkpoint"))


def refused(source: Path, *patterns: str, destination: Path | None = None, **options: Any) -> None:
    """Assert that the refusal matches all patterns, names the place, and that nothing was left there."""
    destination = destination or source.parent / "out" / "store"
    before = sorted(destination.rglob("*"))
    with pytest.raises(PrepareError) as caught:
        prepare(source, destination, **options)
    for pattern in patterns:
        assert re.search(pattern, str(caught.value)), str(caught.value)
    assert sorted(destination.rglob("*")) == before
    assert not list(destination.parent.glob(f".{destination.name}.*"))


def edit_json(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def set_config(source: Path, **values: Any) -> None:
    edit_json(source / "config.json", lambda config: config.update(values))


def shard_with(source: Path, part: str) -> Path:
    index = json.loads((source / "model.safetensors.index.json").read_text())
    return source / next(file for name, file in sorted(index["weight_map"].items()) if part in name)


def rewrite(path: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def test_good_checkpoint_is_taken(source: Path, tmp_path: Path):
    assert prepare(source, tmp_path / "store").num_moe_layers == 2


def test_no_checkpoint(tmp_path: Path):
    refused(tmp_path / "nowhere", "nowhere", "no config.json")


def test_damaged_config(source: Path):
    (source / "config.json").write_text('{"model_type": ')
    refused(source, "config.json is not valid JSON", "download")


def test_config_that_makes_no_sense(source: Path):
    set_config(source, hidden_size="large")
    refused(source, "does not accept", "config.json", "hidden_size")


def test_dense_family(tmp_path: Path):
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    refused(tmp_path / "llama", "not a Mixture of Experts", "'llama'", "mixtral")


def test_supported_family_with_dense_layers_only(tmp_path: Path):
    tiny_checkpoint("qwen2_moe", tmp_path / "dense", mlp_only_layers=[0, 1, 2])
    refused(tmp_path / "dense", "not a Mixture of Experts", "dense")


def test_moe_family_that_was_never_tested(source: Path):
    set_config(source, model_type="qwen3_next")
    refused(source, "'qwen3_next'", "never tested", "supported are: .*mixtral")


def test_unknown_family(source: Path):
    set_config(source, model_type="hyperformer")
    refused(source, "'hyperformer'", "does not know")


@pytest.mark.parametrize("model_type", ["mixtral", "hyperformer"])
def test_remote_code(source: Path, model_type: str):
    set_config(source, model_type=model_type, auto_map={"AutoModelForCausalLM": "modeling_mine.MineForCausalLM"})
    (source / "modeling_mine.py").write_text("raise SystemExit('remote code was run')")
    refused(source, "code of its own", "auto_map", "never run")


def test_code_that_transformers_took_in_is_not_run_and_no_reason_to_refuse(source: Path, tmp_path: Path):
    remote = {"AutoConfig": "mine.MixtralConfig", "AutoModelForCausalLM": "mine.MixtralForCausalLM"}
    set_config(source, auto_map=remote)
    (source / "mine.py").write_text("raise SystemExit('remote code was run')")
    assert "auto_map" not in prepare(source, tmp_path / "store").config


def test_quantised_by_configuration(source: Path):
    set_config(source, quantization_config={"quant_method": "mxfp4"})
    refused(source, "quantised with mxfp4", "bfloat16")


def test_quantised_by_dtype_of_weights(source: Path):
    def quantise(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "experts" in name]:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    rewrite(shard_with(source, ".w1.weight"), quantise)
    refused(source, "quantised", "F8_E4M3", r"\.experts\.")


def test_pickled_weights_only(source: Path):
    for path in source.glob("*.safetensors*"):
        path.unlink()
    (source / "pytorch_model.bin").write_bytes(b"\x80\x02cos\nsystem\n")
    refused(source, "pickle", "pytorch_model.bin", "safetensors")


def test_no_weights(source: Path):
    for path in source.glob("*.safetensors*"):
        path.unlink()
    refused(source, "no weights")


def test_missing_shard(source: Path):
    lost = shard_with(source, "lm_head")
    lost.unlink()
    refused(source, lost.name, "lacks 1 of its", "download")


@pytest.mark.parametrize("lost_bytes", [1, 100_000])
def test_truncated_shard(source: Path, lost_bytes: int):
    path = shard_with(source, "lm_head")
    path.write_bytes(path.read_bytes()[:-lost_bytes])
    refused(source, path.name, "truncated or altered")


def test_altered_header(source: Path):
    path = shard_with(source, "lm_head")
    raw = bytearray(path.read_bytes())
    raw[20] ^= 0xFF
    path.write_bytes(raw)
    refused(source, path.name, "truncated or altered")


def test_empty_shard(source: Path):
    path = shard_with(source, "lm_head")
    path.write_bytes(b"")
    refused(source, path.name, "truncated or altered")


def test_index_and_shard_disagree(source: Path):
    path = shard_with(source, "lm_head")
    rewrite(path, lambda tensors: tensors.update(stray=torch.zeros(1)))
    refused(source, path.name, "'stray'", "index")


def test_damaged_index(source: Path):
    (source / "model.safetensors.index.json").write_text("[]")
    refused(source, "index.json is damaged")


def test_index_that_points_elsewhere(source: Path):
    edit_json(
        source / "model.safetensors.index.json",
        lambda index: index["weight_map"].update({"lm_head.weight": "../other.safetensors"}),
    )
    refused(source, "outside")


@pytest.mark.parametrize(
    ("part", "patterns"),
    [
        ("experts.3.w1.weight", ("7 tensors", "takes 8", "incomplete")),
        ("lm_head.weight", ("lacks 1 tensors", "lm_head.weight", "incomplete")),
        ("block_sparse_moe.gate.weight", ("lacks 1 tensors", "gate.weight")),
    ],
)
def test_missing_tensor(tmp_path: Path, part: str, patterns: tuple[str, ...]):
    source = tiny_checkpoint("mixtral", tmp_path / "checkpoint", num_hidden_layers=1)
    rewrite(source / "model.safetensors", lambda tensors: drop(tensors, part))
    refused(source, *patterns)


def drop(tensors: dict[str, torch.Tensor], part: str) -> None:
    for name in [name for name in tensors if part in name]:
        del tensors[name]


@pytest.mark.parametrize("part", [".w1.weight", ".w2.weight"])
def test_all_of_one_kind_missing(tmp_path: Path, part: str):
    source = tiny_checkpoint("mixtral", tmp_path / "checkpoint", num_hidden_layers=1)
    rewrite(source / "model.safetensors", lambda tensors: drop(tensors, part))
    refused(source, "download the checkpoint again|incomplete")


@pytest.mark.parametrize("part", ["experts.3.w1.weight", "norm.weight"])
def test_wrong_shape(tmp_path: Path, part: str):
    source = tiny_checkpoint("mixtral", tmp_path / "checkpoint", num_hidden_layers=1)

    def shorten(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if part in name]:
            tensors[name] = tensors[name][:-1]

    rewrite(source / "model.safetensors", shorten)
    refused(source, "does not fit its configuration", "download")


def test_no_space(source: Path):
    asked: list[Path] = []

    def free_bytes(path: Path) -> int:
        asked.append(path)
        return 1_000_000

    refused(source, "no space", "GiB", "another disk", free_bytes=free_bytes)
    assert asked == [source.parent / "out"]


def test_destination_is_something_else(source: Path, tmp_path: Path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    refused(source, "photos exists and is not an expert store", destination=tmp_path / "photos")
    (tmp_path / "file").touch()
    refused(source, "file exists and is not an expert store", destination=tmp_path / "file")


def test_source_is_a_store(source: Path, tmp_path: Path):
    prepare(source, tmp_path / "store")
    refused(tmp_path / "store", "expert store already", destination=tmp_path / "again")
