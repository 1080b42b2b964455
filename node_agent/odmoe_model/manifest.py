"""What a store says of itself: the model's configuration, the layout of an expert's record, its files.

Knows nothing of tensors, and nothing of the bytes in the files it names.
"""

import hashlib
from math import prod
from pathlib import Path
from typing import Any, Final

import msgspec

from odmoe_wire.checks import ITEMSIZE_BYTES, Dtype

FORMAT_VERSION: Final = 1
MANIFEST_FILE: Final = "manifest.json"
# Cache lines, AVX-512 loads and CUDA copies all like it; a record and each field of it start on such a bound.
ALIGNMENT_BYTES: Final = 64


class StoreError(ValueError):
    """A store, or a checkpoint to make one of, cannot be used; the message says why and what to do."""


def align(size_bytes: int) -> int:
    """The next multiple of `ALIGNMENT_BYTES`."""
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


class RecordField(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One parameter of one expert inside a record: `shape` without the experts' dimension, `offset` in bytes."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * ITEMSIZE_BYTES[self.dtype]


class StoredFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of the store; `file` is a plain name."""

    file: str
    bytes: int
    sha256: str


class LayerFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file of one MoE layer: one uint8 tensor [num_experts, record_bytes] that begins at `data_offset`.
    `layer` is the ordinal of the MoE layer, `decoder_layer` its place among all layers, `module` the path of
    the experts module in the model."""

    layer: int
    decoder_layer: int
    module: str
    stored: StoredFile
    data_offset: int


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`config` is the checkpoint's configuration; `dtype` that of the weights unless a tensor says otherwise;
    `other_files` the tokenizer, the generation configuration and the like."""

    format_version: int = FORMAT_VERSION
    model_type: str
    config: dict[str, Any]
    dtype: Dtype
    hidden_size: int
    num_experts: int
    top_k: int
    record: tuple[RecordField, ...]
    record_bytes: int
    layers: tuple[LayerFile, ...]
    non_expert: StoredFile
    other_files: tuple[StoredFile, ...]

    @property
    def num_moe_layers(self) -> int:
        return len(self.layers)

    @property
    def digest(self) -> str:
        """sha256 of the canonical manifest; since that holds the digest of every file, it stands for the store."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()

    @property
    def files(self) -> tuple[StoredFile, ...]:
        """Every file of the store but the manifest itself."""
        return (*(layer.stored for layer in self.layers), self.non_expert, *self.other_files)


def plan_record(parameters: list[tuple[str, Dtype, tuple[int, ...]]]) -> tuple[tuple[RecordField, ...], int]:
    """Lay the (name, dtype, shape) parameters of one expert out one after the other, each aligned.

    Returns the fields and the record's length in bytes, itself aligned so that records can follow each other."""
    fields: list[RecordField] = []
    end_bytes = 0
    for name, dtype, shape in parameters:
        fields.append(RecordField(name=name, dtype=dtype, shape=shape, offset=align(end_bytes)))
        end_bytes = fields[-1].offset + fields[-1].size_bytes
    return tuple(fields), align(end_bytes)


def write_manifest(manifest: Manifest, directory: Path) -> Path:
    """Write the manifest where `read_manifest` looks for it; returns the file."""
    path = directory / MANIFEST_FILE
    path.write_bytes(msgspec.json.format(msgspec.json.encode(manifest, order="sorted"), indent=1))
    return path


def read_manifest(directory: Path) -> Manifest:
    """Read and check the manifest of the store in `directory`. Raises StoreError."""
    path = directory / MANIFEST_FILE
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise StoreError(
            f"{directory} is not an expert store (no readable {MANIFEST_FILE}: {error.strerror}); "
            f"make one from a checkpoint: odmoe prepare CHECKPOINT {directory}"
        ) from error
    try:
        version = msgspec.json.decode(raw, type=_Versioned).format_version
        if version != FORMAT_VERSION:
            raise StoreError(
                f"{path} has store format {version}, this odmoe reads format {FORMAT_VERSION}; "
                f"prepare the store again with this version"
            )
        manifest = msgspec.json.decode(raw, type=Manifest)
    except msgspec.MsgspecError as error:
        raise StoreError(f"{path} is damaged ({error}); prepare the store again") from error
    flaw = _flaw(manifest)
    if flaw is not None:
        raise StoreError(f"{path} is damaged ({flaw}); prepare the store again")
    return manifest


class _Versioned(msgspec.Struct):
    format_version: int


def _flaw(manifest: Manifest) -> str | None:
    """What is wrong in a manifest that has the right types."""
    for stored in manifest.files:
        if Path(stored.file).name != stored.file:
            return f"{stored.file!r} is not a plain file name"
    for layer, entry in enumerate(manifest.layers):
        data_bytes = manifest.num_experts * manifest.record_bytes
        if entry.layer != layer or entry.data_offset < 8 or entry.data_offset + data_bytes != entry.stored.bytes:
            return f"the entry of layer {layer} does not fit its file"
    planned = plan_record([(field.name, field.dtype, field.shape) for field in manifest.record])
    if planned != (manifest.record, manifest.record_bytes):
        return "the record's layout does not add up"
    if not manifest.layers or min(manifest.num_experts, manifest.record_bytes, manifest.top_k) < 1:
        return "it has no experts"
    return None
