"""Files written so that they are whole or not there: aligned safetensors with digests, and a directory that
appears under its name only when complete. Knows nothing of experts.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from odmoe_model.checkpoint import PrepareError
from odmoe_model.manifest import MANIFEST_FILE, RecordField, StoredFile, align
from odmoe_wire.codec import Dtype

SAFETENSORS_DTYPE: Final[dict[Dtype, str]] = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int8": "I8",
    "uint8": "U8",
}


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> StoredFile:
    """Write the chunks one after the other, to the disk itself, and digest them on the way."""
    digest, size_bytes = hashlib.sha256(), 0
    with path.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            size_bytes += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return StoredFile(file=path.name, bytes=size_bytes, sha256=digest.hexdigest())


def safetensors_header(tensors: Sequence[RecordField]) -> bytes:
    """The head of a safetensors file that holds the tensors at their offsets behind it; padded (with blanks, as
    the format allows) so that the data starts aligned. The format wants no gaps between the tensors."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": SAFETENSORS_DTYPE[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": (tensor.offset, tensor.offset + tensor.size_bytes),
        }
    text = json.dumps(entries).encode()
    padded = text.ljust(align(8 + len(text)) - 8)
    return len(padded).to_bytes(8, "little") + padded


@contextmanager
def new_directory(destination: Path) -> Iterator[Path]:
    """A temporary sibling of `destination` that takes its name when the block ends well and vanishes otherwise.

    A store already there is replaced at the end; anything else there is refused. The temporary directory is
    locked by the process that fills it, so one without a living owner is known as stale, and taken over."""
    _refuse_foreign(destination)
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = destination.with_name(f".{destination.name}.partial")
    replaced = destination.with_name(f".{destination.name}.replaced")
    lock = _take_over(temporary)
    try:
        shutil.rmtree(replaced, ignore_errors=True)
        yield temporary
        sync(temporary)
        if destination.exists():
            destination.rename(replaced)
        temporary.rename(destination)
        sync(destination.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        # Also on KeyboardInterrupt: nothing half-made stays behind.
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _refuse_foreign(destination: Path) -> None:
    if destination.is_dir() and ((destination / MANIFEST_FILE).is_file() or not any(destination.iterdir())):
        return
    if destination.exists():
        raise PrepareError(f"{destination} exists and is not an expert store; remove it or name another place")


def _take_over(temporary: Path) -> int:
    """Lock the directory, which may be left over from a dead run, and empty it. Returns the lock."""
    while True:
        temporary.mkdir(exist_ok=True)
        lock = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise PrepareError(f"another process is writing {temporary}; wait for it to end") from error
        # Its former owner may have renamed or removed it between our opening and our locking it.
        if temporary.exists() and os.path.samestat(os.fstat(lock), temporary.stat()):
            break
        os.close(lock)
    for entry in temporary.iterdir():
        entry.unlink()
    return lock


def sync(path: Path) -> None:
    """Wait until the file, or what the directory lists, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
