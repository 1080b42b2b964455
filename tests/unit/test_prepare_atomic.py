"""A store is there whole or not at all: interruption, failure, rivals, leftovers of the dead, replacement."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from odmoe_model import prepare as module
from odmoe_model.prepare import PrepareError, prepare
from odmoe_model.store import ExpertStore
from support.tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("olmoe", tmp_path_factory.mktemp("olmoe") / "checkpoint", num_hidden_layers=2)


@pytest.fixture
def destination(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "store"


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def test_progress_grows_to_the_total(source: Path, destination: Path):
    reports: list[tuple[str, int, int]] = []
    manifest = prepare(source, destination, progress=lambda *report: reports.append(report))
    done_bytes = [done for _, done, _ in reports]
    assert done_bytes == sorted(done_bytes)
    assert {total for _, _, total in reports} == {done_bytes[-1]}
    assert done_bytes[-1] >= sum(layer.stored.bytes - layer.data_offset for layer in manifest.layers)
    assert {"layer 1 of 2", "layer 2 of 2", "non-expert weights"} <= {what for what, _, _ in reports}


@pytest.mark.parametrize("stage", ["non-expert weights", "layer 2 of 2", "done"])
@pytest.mark.parametrize("existing", [False, True])
def test_interruption_leaves_things_as_they_were(source: Path, destination: Path, stage: str, existing: bool):
    if existing:
        digest = prepare(source, destination).digest

    def interrupt(what: str, _done: int, _total: int) -> None:
        if what == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(source, destination, progress=interrupt)
    assert names(destination.parent) == (["store"] if existing else [])
    if existing:
        assert ExpertStore.open(destination, verify=True).manifest.digest == digest


def test_a_full_disk_is_told_and_leaves_nothing(source: Path, destination: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "write_file", full)
    with pytest.raises(PrepareError, match="No space left on device"):
        prepare(source, destination)
    assert names(destination.parent) == []


def test_leftovers_of_a_dead_run_are_taken_over(source: Path, destination: Path):
    partial = destination.parent / ".store.partial"
    partial.mkdir(parents=True)
    (partial / "experts-00099.safetensors").write_bytes(b"half")
    manifest = prepare(source, destination)
    assert names(destination.parent) == ["store"]
    assert names(destination) == sorted(["manifest.json", *(stored.file for stored in manifest.files)])


def test_a_living_rival_is_left_alone(source: Path, destination: Path):
    partial = destination.parent / ".store.partial"
    partial.mkdir(parents=True)
    (partial / "theirs").touch()
    lock = os.open(partial, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(PrepareError, match="another process is writing"):
        prepare(source, destination)
    assert names(partial) == ["theirs"]
    os.close(lock)
    prepare(source, destination)


def test_a_store_is_replaced_by_the_new_one(source: Path, destination: Path, tmp_path: Path):
    old = prepare(tiny_checkpoint("mixtral", tmp_path / "mixtral"), destination)
    new = prepare(source, destination)
    assert names(destination.parent) == ["store"]
    assert ExpertStore.open(destination, verify=True).manifest.digest == new.digest != old.digest


def test_the_same_checkpoint_gives_the_same_digest_anywhere(source: Path, destination: Path, tmp_path: Path):
    assert prepare(source, destination).digest == prepare(source, tmp_path / "elsewhere").digest


def test_an_empty_directory_is_a_fine_destination(source: Path, destination: Path):
    destination.mkdir(parents=True)
    prepare(source, destination)
    ExpertStore.open(destination, verify=True)
