"""From what a user calls a model (a directory, a hub name, a built-in) to the prepared store on this disk.

Knows where stores are cached and that only one process may make one at a time. Does not know how a checkpoint becomes
a store, and loads no torch before one has to be made.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

import odmoe_model.builtin as builtin
from odmoe_model.manifest import FORMAT_VERSION, MANIFEST_FILE

# (what is being done, fraction of it)
Progress = Callable[[str, float], None]

HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model")
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(@\w[\w.-]*)?")
_LOCK_WAIT_S = 3600.0


class ModelError(ValueError):
    """There is no such model, or it cannot be made; the message says what to do."""


def cache_dir() -> Path:
    """Where stores are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "odmoe" / "stores"


def own_name(model: str) -> str:
    """The name a model is served under when nobody says otherwise."""
    if model in builtin.BUILTIN_NAMES or _is_hub_name(model):
        return model.partition("@")[0]
    return Path(model).resolve().name


def find_store(model: str) -> Path | None:
    """The prepared store of `model` if there is one already. Raises `ModelError` if there is no such model."""
    path = Path(model)
    if model not in builtin.BUILTIN_NAMES and (path / MANIFEST_FILE).is_file():
        return path.resolve()
    place = _place_in_cache(model)
    return place if place is not None and (place / MANIFEST_FILE).is_file() else None


def make_store(
    model: str,
    destination: Path | None = None,
    *,
    progress: Progress,
    wheel: Path | None = None,
    keep_checkpoint: Path | None = None,
) -> Path:
    """Prepare `model` at `destination`, or in the cache unless it is there. Slow; imports torch.

    Raises ValueError (ModelError, PrepareError) or BuiltinError with a message for the user. Interrupted, it leaves
    nothing half-made.
    """
    if model not in builtin.BUILTIN_NAMES:
        checkpoint = _checkpoint_directory(model, progress)
        if destination is None and (checkpoint / MANIFEST_FILE).is_file():
            return checkpoint
        place = destination or _cached(own_name(model), _fingerprint(checkpoint))
    else:
        place = destination or _cached(model, _recipe_fingerprint(model))
    with _alone_at(place, progress) as scratch:
        if destination is None and (place / MANIFEST_FILE).is_file():
            return place  # made by another process while this one waited
        if model in builtin.BUILTIN_NAMES:
            checkpoint = keep_checkpoint or scratch
            builtin.build_checkpoint(model, checkpoint, wheel=wheel, progress=progress)
        _prepare(checkpoint, place, progress)
    return place


def _prepare(checkpoint: Path, place: Path, progress: Progress) -> None:
    from odmoe_model.prepare import prepare  # imports torch

    prepare(checkpoint, place, progress=lambda what, done, total: progress(what, done / max(total, 1)))


@contextmanager
def _alone_at(place: Path, progress: Progress) -> Iterator[Path]:
    """While this lasts no other process makes `place`. Gives the path of a directory beside it for what is only
    needed on the way; whoever was killed before may have left one."""
    place.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(place.with_name(f".{place.name}.lock"))
    scratch = place.with_name(f".{place.name}.building")
    with _patiently(lock, place, progress):
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _patiently(lock: FileLock, place: Path, progress: Progress) -> Iterator[None]:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress("another process is preparing this model; waiting for it", 0.0)
        try:
            lock.acquire(timeout=_LOCK_WAIT_S)
        except Timeout:
            raise ModelError(f"another process has been preparing {place} for an hour; see what it does") from None
    try:
        yield
    finally:
        lock.release()


def _place_in_cache(model: str) -> Path | None:
    """Where the cache has, or would have, the store; None if that cannot be known without the hub."""
    if model in builtin.BUILTIN_NAMES:
        return _cached(model, _recipe_fingerprint(model))
    path = Path(model)
    if path.is_dir():
        return _cached(own_name(model), _fingerprint(path))
    if not _is_hub_name(model):
        raise ModelError(
            f"there is no model '{model}': give the directory of a prepared store or of a checkpoint, a hub name"
            f" (org/name), or one of {', '.join(builtin.BUILTIN_NAMES)}"
        )
    snapshot = _hub_snapshot(model, offline=True)
    return None if snapshot is None else _cached(own_name(model), _fingerprint(snapshot))


def _checkpoint_directory(model: str, progress: Progress) -> Path:
    if Path(model).is_dir():
        return Path(model).resolve()
    _place_in_cache(model)  # refuses what is no model at all
    progress(f"fetching {model} from the hub", 0.0)
    snapshot = _hub_snapshot(model, offline=False)
    assert snapshot is not None, "only an offline look may find nothing"
    return snapshot


def _hub_snapshot(model: str, *, offline: bool) -> Path | None:
    """The hub's files of `model`, from its own cache or by network. Raises `ModelError` if the hub cannot be had."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    name, _, revision = model.partition("@")
    try:
        directory = snapshot_download(
            name, revision=revision or None, allow_patterns=list(HUB_FILES), local_files_only=offline
        )
    except LocalEntryNotFoundError as error:
        if offline:
            return None
        raise ModelError(
            f"the hub cannot be reached from here, and {model} is not in its cache: mend the network, or give the"
            " directory of a checkpoint that was downloaded elsewhere"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(f"the hub did not give {model}: {error}") from error
    return Path(directory)


def _is_hub_name(model: str) -> bool:
    return _HUB_NAME.fullmatch(model) is not None and not Path(model).exists()


def _cached(name: str, fingerprint: str) -> Path:
    return cache_dir() / f"{name.replace('/', '--')}-{fingerprint}"


def _fingerprint(checkpoint: Path) -> str:
    """Changes when the checkpoint does: names, sizes and times of its files."""
    digest = hashlib.sha256(f"{FORMAT_VERSION} {checkpoint.resolve()}".encode())
    for path in sorted(path for pattern in HUB_FILES for path in checkpoint.glob(pattern)):
        status = path.stat()
        digest.update(f"\n{path.name} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:12]


def _recipe_fingerprint(name: str) -> str:
    """Changes when this release makes another checkpoint under that name."""
    digests = Path(builtin.__file__).with_name("digests.json")
    recipe = digests.read_bytes() if digests.is_file() else b""
    return hashlib.sha256(f"{FORMAT_VERSION} {name}\n".encode() + recipe).hexdigest()[:12]
