"""A store opened for reading: records of experts out of mapped files, and the other weights.

Knows nothing of slots, devices or how a store is made (`prepare`). A mapping is private to the process: writing
to a record would change this process's copy only, never the file.
"""

import hashlib
import mmap
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from odmoe_model.manifest import Manifest, StoredFile, StoreError, read_manifest
from odmoe_model.tensors import TORCH_DTYPE

__all__ = ["ExpertStore", "StoreError", "record_fields"]


def record_fields(manifest: Manifest, record_u8: Tensor) -> dict[str, Tensor]:
    """The parameters inside a record as typed views of it, by the names the family's experts class gives them.

    `record_u8` is any uint8 tensor [record_bytes] on any device whose memory starts on a bound of 64 bytes."""
    assert record_u8.shape == (manifest.record_bytes,), f"{record_u8.shape} is no record"
    return {
        field.name: record_u8[field.offset : field.offset + field.size_bytes]
        .view(TORCH_DTYPE[field.dtype])
        .view(field.shape)
        for field in manifest.record
    }


class ExpertStore:
    """Use `ExpertStore.open`. `manifest` says what is in it; `layer` is the ordinal of a MoE layer."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._records_ER = [
            _map(path / layer.stored.file, offset=layer.data_offset).view(manifest.num_experts, manifest.record_bytes)
            for layer in manifest.layers
        ]

    @classmethod
    def open(cls, path: Path, *, verify: bool) -> "ExpertStore":
        """Open the store in directory `path`. The sizes of all files are checked, with `verify` their digests
        too (reads every byte). Raises StoreError, which names the file at fault."""
        manifest = read_manifest(path)
        for stored in manifest.files:
            _check(path, stored, verify=verify)
        return cls(path, manifest)

    @property
    def tokenizer_dir(self) -> Path:
        """The directory tokenizer and generation configuration are in; as transformers expects them."""
        return self.path

    def record(self, layer: int, expert: int) -> Tensor:
        """The expert's bytes, uint8 [record_bytes]: a view of the mapped file, read from disk when touched."""
        return self._records_ER[layer][expert]

    def fields(self, record_u8: Tensor) -> dict[str, Tensor]:
        """See `record_fields`."""
        return record_fields(self.manifest, record_u8)

    def non_expert(self) -> Mapping[str, Tensor]:
        """Every other weight of the checkpoint by its name in the model, as views of the mapped file."""
        tensors: dict[str, Tensor] = load_file(self.path / self.manifest.non_expert.file)
        return tensors


def _map(path: Path, *, offset: int) -> Tensor:
    """The file from `offset` on as uint8. Copy-on-write, because torch warns of memory it may not write to."""
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return torch.frombuffer(mapping, dtype=torch.uint8, offset=offset)


def _check(directory: Path, stored: StoredFile, *, verify: bool) -> None:
    path = directory / stored.file
    try:
        size_bytes = path.stat().st_size
        if size_bytes != stored.bytes:
            raise StoreError(
                f"{path} was truncated or altered: it has {size_bytes} bytes, the manifest says {stored.bytes}; "
                f"prepare the store again"
            )
        if verify:
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            if sha256 != stored.sha256:
                raise StoreError(
                    f"{path} was altered: its sha256 is {sha256}, the manifest says {stored.sha256}; "
                    f"prepare the store again"
                )
    except OSError as error:
        raise StoreError(f"{path} cannot be read ({error.strerror}); prepare the store again") from error
