"""From a model's name to its store: what is found, what is made, what is left behind."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

import odmoe_model.builtin
import odmoe_model.prepare
from odmoe_model.manifest import MANIFEST_FILE
from odmoe_server import models

Report = Callable[[str, int, int], None]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "cache"


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, Path]]:
    """Stands in for the real preparation; remembers what was prepared."""
    calls = []

    def prepare(source: Path, destination: Path, *, progress: Report) -> None:
        calls.append((source, destination))
        assert (source / "config.json").is_file()
        destination.mkdir(parents=True, exist_ok=True)
        progress("layer 1", 1, 2)
        (destination / MANIFEST_FILE).write_text("{}")

    monkeypatch.setattr(odmoe_model.prepare, "prepare", prepare)
    return calls


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Stands in for the making of built-ins."""
    places = []

    def build(name: str, destination: Path, *, wheel: Path | None, progress: models.Progress) -> None:
        places.append(destination)
        destination.mkdir(parents=True)
        (destination / "config.json").write_text("{}")

    monkeypatch.setattr(odmoe_model.builtin, "build_checkpoint", build)
    return places


def checkpoint(directory: Path, *, weights: bytes = b"w") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(weights)
    return directory


def silent(what: str, fraction: float) -> None:
    assert 0 <= fraction <= 1


def test_a_store_is_taken_as_it_is(tmp_path: Path, prepared: list[tuple[Path, Path]]) -> None:
    store = tmp_path / "store"
    store.mkdir()
    (store / MANIFEST_FILE).write_text("{}")
    assert models.find_store(str(store)) == store
    assert models.make_store(str(store), progress=silent) == store
    assert prepared == []


def test_a_checkpoint_is_prepared_once(tmp_path: Path, cache: Path, prepared: list[tuple[Path, Path]]) -> None:
    source = checkpoint(tmp_path / "my-model")
    assert models.find_store(str(source)) is None
    store = models.make_store(str(source), progress=silent)
    assert store.parent == cache / "odmoe" / "stores"
    assert store.name.startswith("my-model-")
    assert models.find_store(str(source)) == store == models.make_store(str(source), progress=silent)
    assert prepared == [(source, store)]


def test_a_changed_checkpoint_is_another(tmp_path: Path, prepared: list[tuple[Path, Path]]) -> None:
    source = checkpoint(tmp_path / "my-model")
    store = models.make_store(str(source), progress=silent)
    checkpoint(source, weights=b"other weights")
    assert models.find_store(str(source)) is None
    assert models.make_store(str(source), progress=silent) != store


def test_a_place_of_ones_own(tmp_path: Path, cache: Path, prepared: list[tuple[Path, Path]]) -> None:
    source = checkpoint(tmp_path / "my-model")
    assert models.make_store(str(source), tmp_path / "here", progress=silent) == tmp_path / "here"
    models.make_store(str(source), tmp_path / "here", progress=silent)
    assert len(prepared) == 2, "who names a place wants it made anew"
    assert not cache.exists()


@pytest.mark.parametrize("name", odmoe_model.builtin.BUILTIN_NAMES)
def test_a_built_in_is_made_and_its_checkpoint_goes(
    name: str, cache: Path, prepared: list[tuple[Path, Path]], built: list[Path]
) -> None:
    store = models.make_store(name, progress=silent)
    assert models.find_store(name) == store
    assert store.name.startswith(f"{name}-")
    assert [path.name for path in store.parent.iterdir() if path.is_dir()] == [store.name]
    models.make_store(name, progress=silent)
    assert len(built) == 1


def test_a_built_ins_checkpoint_can_be_kept(
    tmp_path: Path, prepared: list[tuple[Path, Path]], built: list[Path]
) -> None:
    models.make_store("default", progress=silent, keep_checkpoint=tmp_path / "kept")
    assert (tmp_path / "kept" / "config.json").is_file()


def test_what_a_killed_process_left_is_removed(
    cache: Path, prepared: list[tuple[Path, Path]], built: list[Path]
) -> None:
    store = models.make_store("default", progress=silent)
    (store / MANIFEST_FILE).unlink()
    leftover = store.with_name(f".{store.name}.building")
    leftover.mkdir()
    models.make_store("default", progress=silent)
    assert not leftover.exists()


def test_an_interrupted_build_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(name: str, destination: Path, *, wheel: Path | None, progress: models.Progress) -> None:
        destination.mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(odmoe_model.builtin, "build_checkpoint", build)
    with pytest.raises(KeyboardInterrupt):
        models.make_store("default", progress=silent)
    assert models.find_store("default") is None
    assert not any(path.is_dir() for path in (cache / "odmoe" / "stores").iterdir())


def test_two_at_once_make_it_once(cache: Path, prepared: list[tuple[Path, Path]], built: list[Path]) -> None:
    store = models.make_store("default", progress=silent)
    (store / MANIFEST_FILE).unlink()
    waiting = threading.Event()
    stores: list[Path] = []

    def tell(what: str, fraction: float) -> None:
        if "another process" in what:
            waiting.set()

    thread = threading.Thread(target=lambda: stores.append(models.make_store("default", progress=tell)))
    with FileLock(store.with_name(f".{store.name}.lock")):
        thread.start()
        assert waiting.wait(10)
        (store / MANIFEST_FILE).write_text("{}")  # the other process has made it
    thread.join(10)
    assert stores == [store]
    assert len(built) == 1


@pytest.mark.parametrize("model", ["no-such-model", "./nowhere", "/nowhere/at/all", "a/b/c"])
def test_no_such_model(model: str) -> None:
    with pytest.raises(models.ModelError, match="default, partitioned"):
        models.find_store(model)
    with pytest.raises(models.ModelError, match="default, partitioned"):
        models.make_store(model, progress=silent)


def test_a_hub_name_without_the_hub() -> None:
    assert models.find_store("some-org/some-model") is None
    with pytest.raises(models.ModelError, match="some-org/some-model"):
        models.make_store("some-org/some-model", progress=silent)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("default", "default"),
        ("org/model", "org/model"),
        ("org/model@v1", "org/model"),
        ("/stores/mine", "mine"),
        ("/stores/mine/", "mine"),
    ],
)
def test_the_name_it_is_served_under(model: str, name: str) -> None:
    assert models.own_name(model) == name
