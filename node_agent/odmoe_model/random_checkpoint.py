"""Writes checkpoints with random weights, of any shape of the supported families, for benchmarks.

Names and layouts are those their makers publish, which transformers' own conversion mapping knows. Values are made and
written some rows at a time, so that memory holds no layer and no expert, let alone a model. Knows no store.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from odmoe_model.family import empty_model, experts_modules
from odmoe_model.manifest import RecordField
from odmoe_model.random_shape import RandomCheckpointError, RandomShape, random_config
from odmoe_model.tensors import DTYPE_NAME, as_bytes
from odmoe_model.toy_tokenizer import LEAST_VOCAB, SPECIAL_IDS, write_toy_tokenizer
from odmoe_model.writing import new_directory, safetensors_header, write_file

# (what is being written, bytes written, bytes in all)
Progress = Callable[[str, int, int], None]
DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16}
_SHARD_BYTES: Final = 2_000_000_000
_PORTION_BYTES: Final = 64_000_000
# Room for the tokenizer, the index and the headers.
_MARGIN_BYTES: Final = 16_000_000


@dataclass(frozen=True)
class _Planned:
    """A tensor of the checkpoint. `deviation` is that of its values round `mean`; row `silent` is zero."""

    name: str
    shape: tuple[int, ...]
    mean: float
    deviation: float
    silent: int | None = None


class RandomCheckpoint:
    """The plan of a checkpoint: `num_parameters`, `total_bytes` of weights and `expert_bytes` among them are exact.
    `write` carries it out. Raises RandomCheckpointError when there is no model of this shape."""

    def __init__(self, shape: RandomShape, *, seed: int = 0) -> None:
        if shape.vocab < LEAST_VOCAB:
            raise RandomCheckpointError(
                f"a vocabulary of {shape.vocab} has no room for {LEAST_VOCAB} bytes and markers; use at least that many"
            )
        self.shape, self._seed, self._dtype = shape, seed, DTYPES[shape.dtype]
        self._config = random_config(shape, special_ids=SPECIAL_IDS)
        self._tensors, num_expert = _plan(self._config, dtype=self._dtype)
        self.num_parameters = sum(math.prod(tensor.shape) for tensor in self._tensors)
        self.total_bytes = self.num_parameters * self._dtype.itemsize
        self.expert_bytes = num_expert * self._dtype.itemsize

    def write(
        self,
        destination: Path,
        *,
        progress: Progress | None = None,
        free_bytes: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free,
    ) -> None:
        """Write the checkpoint to `destination`, which must not exist; it takes this name when it is whole.
        `free_bytes` tells the room on the disk of a directory. Raises RandomCheckpointError."""
        if destination.exists():
            raise RandomCheckpointError(f"{destination} exists already; remove it or name another place")
        try:
            with new_directory(destination) as directory, torch.no_grad():
                self._refuse_no_space(directory.parent, free_bytes(directory.parent))
                self._write_weights(directory, progress or (lambda what, done, total: None))
                self._write_configuration(directory)
        except OSError as error:
            raise RandomCheckpointError(f"{destination} cannot be written: {error}") from error

    def _refuse_no_space(self, place: Path, free_bytes: int) -> None:
        needed_bytes = self.total_bytes + _MARGIN_BYTES
        if free_bytes < needed_bytes:
            raise RandomCheckpointError(
                f"no space in {place}: the checkpoint takes {needed_bytes / 1e9:.2f} GB, {free_bytes / 1e9:.2f} GB are "
                f"free; free some, name a place on another disk, or make a smaller model"
            )

    def _write_weights(self, directory: Path, progress: Progress) -> None:
        shards = self._shards()
        done_bytes, weight_map = 0, {}

        def chunks(shard: list[_Planned], what: str) -> Iterator[bytes | memoryview]:
            nonlocal done_bytes
            yield safetensors_header(self._entries(shard))
            for tensor in shard:
                for values in self._values(tensor):
                    yield as_bytes(values)
                    done_bytes += values.nbytes
                    progress(what, done_bytes, self.total_bytes)

        for index, shard in enumerate(shards, start=1):
            file = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
            write_file(directory / file, chunks(shard, f"weights, file {index} of {len(shards)}"))
            weight_map.update({tensor.name: file for tensor in shard})
        index_text = json.dumps({"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}, indent=1)
        (directory / "model.safetensors.index.json").write_text(index_text + "\n", "utf-8")

    def _shards(self) -> list[list[_Planned]]:
        shards: list[list[_Planned]] = [[]]
        size_bytes = 0
        for tensor in self._tensors:
            tensor_bytes = math.prod(tensor.shape) * self._dtype.itemsize
            if shards[-1] and size_bytes + tensor_bytes > _SHARD_BYTES:
                shards.append([])
                size_bytes = 0
            shards[-1].append(tensor)
            size_bytes += tensor_bytes
        return shards

    def _entries(self, shard: list[_Planned]) -> list[RecordField]:
        entries, offset = [], 0
        for tensor in shard:
            entries.append(
                RecordField(name=tensor.name, dtype=DTYPE_NAME[self._dtype], shape=tensor.shape, offset=offset)
            )
            offset += entries[-1].size_bytes
        return entries

    def _values(self, tensor: _Planned) -> Iterator[Tensor]:
        """The tensor some rows at a time. Its values depend on the seed and its name alone."""
        digest = hashlib.sha256(f"{self._seed} {tensor.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        num_rows, rest = tensor.shape[0], tensor.shape[1:]
        step = max(1, _PORTION_BYTES // (math.prod(rest) * self._dtype.itemsize))
        for first in range(0, num_rows, step):
            values = torch.full((min(step, num_rows - first), *rest), tensor.mean, dtype=self._dtype)
            if tensor.deviation:
                values.normal_(tensor.mean, tensor.deviation, generator=generator)
            if tensor.silent is not None and first <= tensor.silent < first + step:
                values[tensor.silent - first] = 0
            yield values

    def _write_configuration(self, directory: Path) -> None:
        self._config.architectures = [type(empty_model(self._config, dtype=self._dtype)).__name__]
        self._config.save_pretrained(directory)
        (directory / "generation_config.json").write_text(json.dumps(SPECIAL_IDS, indent=2) + "\n", "utf-8")
        write_toy_tokenizer(directory, vocab=self.shape.vocab, context=self.shape.context)


def _plan(config: PreTrainedConfig, *, dtype: torch.dtype) -> tuple[list[_Planned], int]:
    """Every tensor as it is published, in the order of the model, and how many parameters experts have."""
    try:
        model = empty_model(config, dtype=dtype)
    except (RuntimeError, ValueError, TypeError, KeyError, ZeroDivisionError) as error:
        raise RandomCheckpointError(
            f"transformers cannot build a {config.model_type} of this shape: {error}"
        ) from error
    transposed = {f"{path}.{name}" for path, module in experts_modules(model) for name, _ in _stacked(module)}
    tied = set(model.all_tied_weights_keys)
    planned: list[_Planned] = []
    for name, parameter in model.state_dict().items():
        if name not in tied:
            mean, deviation = _distribution(model, name, parameter, transposed=name in transposed)
            silent = SPECIAL_IDS["eos_token_id"] if _makes_logits(model, name) else None
            for published, tensor in revert_weight_conversion(model, {name: parameter}).items():
                planned.append(_Planned(published, tuple(tensor.shape), mean, deviation, silent))
    num_expert = sum(parameter.numel() for _, module in experts_modules(model) for parameter in module.parameters())
    return planned, num_expert


def _stacked(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The weights of an experts module that are [expert, input, output], where others are [.., output, input]."""
    return [
        (name, p) for name, p in module.named_parameters() if getattr(module, "is_transposed", False) and p.ndim == 3
    ]


def _distribution(model: PreTrainedModel, name: str, parameter: Tensor, *, transposed: bool) -> tuple[float, float]:
    """Mean and standard deviation that keep activations near 1 in size: routers then tell tokens apart, and logits
    are near 1 too. Biases, and the statistics some routers balance by, are 0; norms are 1."""
    owner = model.get_submodule(name.rpartition(".")[0])
    if name.endswith("bias") or (parameter.ndim == 1 and not name.endswith("weight")):
        return 0.0, 0.0
    if parameter.ndim == 1:
        return 1.0, 0.0
    if isinstance(owner, nn.Embedding) and not model.config.tie_word_embeddings:
        return 0.0, 1.0
    fan_in = parameter.shape[-2] if transposed else parameter.shape[-1]
    return 0.0, 1 / math.sqrt(fan_in)


def _makes_logits(model: PreTrainedModel, name: str) -> bool:
    """Whether rows of this parameter are tokens whose logits it makes. That of the end of text is silenced, so that
    greedy answers have the length that was asked for."""
    owner = model.get_submodule(name.rpartition(".")[0])
    tied = model.config.tie_word_embeddings
    return name.endswith(".weight") and owner is (
        model.get_input_embeddings() if tied else model.get_output_embeddings()
    )
