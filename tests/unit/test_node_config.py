"""A node's settings and its default name."""

from pathlib import Path

import pytest

from odmoe_node.config import NodeSettings
from odmoe_node.identity import DefaultName
from odmoe_wire.settings import SettingsError, load

NEEDED = ["--store", "/models/store", "--server-endpoint", "tcp://127.0.0.1:5570"]


def settings(*flags: str) -> NodeSettings:
    return load(NodeSettings, [*NEEDED, *flags], prog="odmoe-node")


def test_flags_become_settings() -> None:
    assert settings("--slots", "3", "--no-verify").slots == 3
    assert settings("--memory-mb", "64").memory_mb == 64
    assert settings().verify


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--slots", "2", "--memory-mb", "64"], "not both"),
        (["--slots", "0"], "--slots"),
        (["--device", "tpu"], "--device"),
        (["--node-id", "no spaces"], "--node-id"),
        (["--slot", "2"], "--slot"),
    ],
)
def test_senseless_settings_are_refused_by_name(flags: list[str], complaint: str) -> None:
    with pytest.raises(SettingsError, match=complaint):
        settings(*flags)


def test_the_store_and_the_server_are_needed() -> None:
    with pytest.raises(SettingsError, match=r"--store is required(.|\n)*--server-endpoint is required"):
        load(NodeSettings, [], prog="odmoe-node")


def test_default_names_are_unique_on_a_host_and_come_back_after_a_restart(tmp_path: Path) -> None:
    store = tmp_path / "store"
    first = DefaultName(store, directory=tmp_path, host="Box_1.example.org")
    second = DefaultName(store, directory=tmp_path, host="Box_1.example.org")
    other = DefaultName(tmp_path / "other", directory=tmp_path, host="Box_1.example.org")
    assert first.name.startswith("Box-1-")
    assert len({first.name, second.name, other.name}) == 3
    first.close()
    again = DefaultName(store, directory=tmp_path, host="Box_1.example.org")
    assert again.name == first.name
    for name in (second, other, again):
        name.close()
