"""Turn a checkpoint into an expert store, one MoE layer at a time.

In memory at once are a few experts (see `conversion`), one layer's where the checkpoint has them stacked and they
must be cast, and before that the non-expert weights. Knows nothing of how a store is read.
"""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import torch

from odmoe_model.checkpoint import Checkpoint, PrepareError
from odmoe_model.conversion import Conversion
from odmoe_model.manifest import (
    ALIGNMENT_BYTES,
    LayerFile,
    Manifest,
    RecordField,
    StoredFile,
    align,
    plan_record,
    write_manifest,
)
from odmoe_model.quiet import no_loading_bars
from odmoe_model.tensors import DTYPE_NAME, as_bytes
from odmoe_model.writing import new_directory, safetensors_header, sync, write_file

__all__ = ["PrepareError", "Progress", "prepare"]

# (what is being written, bytes written, bytes in all)
Progress = Callable[[str, int, int], None]
NON_EXPERT_FILE: Final = "non_expert.safetensors"
OTHER_FILES: Final = (
    "config.json",
    "generation_config.json",
    "chat_template.*",
    "*token*.json",
    "*.model",
    "*.tiktoken",
    "merges.txt",
    "vocab.*",
)
# Room for the manifest and the headers.
_MARGIN_BYTES: Final = 1 << 20
_COPY_BYTES: Final = 1 << 20


def prepare(
    source: Path,
    destination: Path,
    *,
    progress: Progress | None = None,
    free_bytes: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free,
) -> Manifest:
    """Make the store of the checkpoint in directory `source` at `destination`; returns its manifest.

    The store appears under its name when it is complete and on the disk, replacing one that was there; whatever
    interrupts this leaves `destination` as it was. `free_bytes` tells the room on the disk of a directory.
    Raises PrepareError with what is wrong and what to do about it."""
    try:
        with no_loading_bars(), torch.no_grad(), Checkpoint(source) as checkpoint:
            conversion = Conversion(checkpoint)
            with new_directory(destination) as directory:
                return _Preparation(checkpoint, conversion, directory, progress, free_bytes).run()
    except OSError as error:
        raise PrepareError(f"{destination} cannot be made from {source}: {error}") from error


class _Preparation:
    """One run: everything that is the same for all files of the store."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        conversion: Conversion,
        directory: Path,
        progress: Progress | None,
        free_bytes: Callable[[Path], int],
    ) -> None:
        self._checkpoint, self._conversion, self._directory = checkpoint, conversion, directory
        self._progress, self._free_bytes = progress, free_bytes
        self._record, self._record_bytes, self._num_experts = _plan(conversion)
        self._done_bytes = 0
        self._total_bytes = conversion.non_expert_bytes
        self._total_bytes += len(conversion.experts) * self._num_experts * self._record_bytes

    def run(self) -> Manifest:
        self._refuse_no_space()
        config = self._checkpoint.config
        others = tuple(self._copy(path) for path in _other_files(self._checkpoint.directory))
        manifest = Manifest(
            model_type=config.model_type,
            config=self._checkpoint.clean_config,
            dtype=DTYPE_NAME[self._checkpoint.dtype],
            hidden_size=config.hidden_size,
            num_experts=self._num_experts,
            top_k=config.num_experts_per_tok,
            record=self._record,
            record_bytes=self._record_bytes,
            non_expert=self._write_non_expert(),
            layers=tuple(self._write_layer(layer) for layer in range(len(self._conversion.experts))),
            other_files=others,
        )
        sync(write_manifest(manifest, self._directory))
        self._report("done", self._total_bytes - self._done_bytes)
        return manifest

    def _refuse_no_space(self) -> None:
        others_bytes = sum(path.stat().st_size for path in _other_files(self._checkpoint.directory))
        needed_bytes = self._total_bytes + others_bytes + _MARGIN_BYTES
        free_bytes = self._free_bytes(self._directory.parent)
        if free_bytes < needed_bytes:
            raise PrepareError(
                f"no space for the store in {self._directory.parent}: it takes {needed_bytes / 2**30:.2f} GiB, "
                f"{free_bytes / 2**30:.2f} GiB are free; free some or name a place on another disk"
            )

    def _write_layer(self, layer: int) -> LayerFile:
        path, _ = self._conversion.experts[layer]
        shape = (self._num_experts, self._record_bytes)
        header = safetensors_header([RecordField(name="records", dtype="uint8", shape=shape, offset=0)])
        stored = write_file(self._directory / f"experts-{layer:05d}.safetensors", self._layer_chunks(layer, header))
        decoder_layer = re.search(r"\.(\d+)\.", path)
        assert decoder_layer is not None, path
        return LayerFile(
            layer=layer,
            decoder_layer=int(decoder_layer[1]),
            module=path,
            stored=stored,
            data_offset=len(header),
        )

    def _layer_chunks(self, layer: int, header: bytes) -> Iterator[bytes | memoryview]:
        """The bytes of a layer's file, expert by expert."""
        yield header
        for parameters in self._conversion.experts_of(layer):
            for expert in range(len(parameters[self._record[0].name])):
                for field in self._record:
                    values = parameters[field.name][expert].contiguous()
                    assert (DTYPE_NAME[values.dtype], values.shape) == (field.dtype, field.shape), field
                    yield as_bytes(values)
                    yield bytes(align(field.size_bytes) - field.size_bytes)
                self._report(f"layer {layer + 1} of {len(self._conversion.experts)}", self._record_bytes)

    def _write_non_expert(self) -> StoredFile:
        tensors = self._conversion.non_expert()
        # Those of odd sizes last: then all of the others are aligned without gaps, which the format forbids.
        names = sorted(tensors, key=lambda name: (tensors[name].nbytes % ALIGNMENT_BYTES != 0, name))
        entries: list[RecordField] = []
        end_bytes = 0
        for name in names:
            tensor = tensors[name]
            entry = RecordField(name=name, dtype=DTYPE_NAME[tensor.dtype], shape=tuple(tensor.shape), offset=end_bytes)
            entries.append(entry)
            end_bytes += entry.size_bytes

        def chunks() -> Iterator[bytes | memoryview]:
            yield safetensors_header(entries)
            for name in names:
                yield as_bytes(tensors[name].contiguous())
                self._report("non-expert weights", tensors[name].nbytes)

        return write_file(self._directory / NON_EXPERT_FILE, chunks())

    def _copy(self, path: Path) -> StoredFile:
        with path.open("rb") as file:
            return write_file(self._directory / path.name, iter(lambda: file.read(_COPY_BYTES), b""))

    def _report(self, what: str, new_bytes: int) -> None:
        self._done_bytes += new_bytes
        if self._progress is not None:
            self._progress(what, self._done_bytes, self._total_bytes)


def _plan(conversion: Conversion) -> tuple[tuple[RecordField, ...], int, int]:
    """The fields and the length of a record, and how many a layer has; the same in all layers, or PrepareError."""
    plans = {
        tuple((name, DTYPE_NAME[p.dtype], tuple(p.shape)) for name, p in module.named_parameters())
        for _, module in conversion.experts
    }
    if len(plans) > 1:
        raise PrepareError("the experts of this checkpoint differ in shape from layer to layer; this is not supported")
    stacked = plans.pop()
    record, record_bytes = plan_record([(name, dtype, shape[1:]) for name, dtype, shape in stacked])
    return record, record_bytes, stacked[0][2][0]


def _other_files(source: Path) -> list[Path]:
    """What goes into the store as it is."""
    return sorted({path for pattern in OTHER_FILES for path in source.glob(pattern) if path.is_file()})
