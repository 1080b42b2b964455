"""Settings of importance mode: what reaches the engine, and that nothing that is given is ignored."""

from pathlib import Path

import pytest

from odmoe_server.config import ServerSettings, ServeSettings
from odmoe_server.importance.options import ImportanceOptions
from odmoe_server.serving import engine_options
from odmoe_wire.settings import SettingsError, load

Either = type[ServerSettings] | type[ServeSettings]
BOTH = pytest.mark.parametrize("kind", [ServerSettings, ServeSettings])
MODE = ["--mode", "importance"]
OWN = [
    ["--alpha", "0.2"],
    ["--max-alpha", "0"],
    ["--max-substituted-weight", "0.5"],
    ["--eviction", "lfu"],
    ["--eviction-window", "4"],
    ["--prefetch", "off"],
    ["--cpu-share"],
]


def test_it_is_off_by_default() -> None:
    assert engine_options(load(ServerSettings, [], prog="x")).importance is None


def test_the_mode_alone_has_its_own_defaults() -> None:
    assert engine_options(load(ServerSettings, MODE, prog="x")).importance == ImportanceOptions()


def test_all_of_it_reaches_the_engine() -> None:
    argv = [*MODE, "--alpha", "0.2", "--max-alpha", "0.4", "--max-substituted-weight", "0.5", "--eviction", "forecast"]
    argv += ["--eviction-window", "4", "--prefetch", "shadow", "--cpu-share"]
    assert engine_options(load(ServerSettings, argv, prog="x")).importance == ImportanceOptions(
        alpha=0.2,
        max_alpha=0.4,
        max_weight=0.5,
        eviction="forecast",
        window=4,
        prefetch="shadow",
        cpu_share=True,
    )


@BOTH
@pytest.mark.parametrize("argv", OWN, ids=lambda argv: argv[0])
def test_without_the_mode_none_of_it_says_anything(kind: Either, argv: list[str]) -> None:
    with pytest.raises(SettingsError, match=f"{argv[0]} says nothing with --mode on-demand"):
        load(kind, argv, prog="x")


@BOTH
@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--slot-mode", "lru"], "--slot-mode lru is for --mode on-demand"),
        (["--group-size", "2"], "--group-size says nothing"),
        (["--alpha", "0.5", "--max-alpha", "0.4"], "--alpha 0.5 is above --max-alpha 0.4"),
        (["--eviction", "lru", "--eviction-window", "4"], "--eviction-window says nothing with --eviction lru"),
        (["--eviction", "lfu", "--eviction-window", "4"], "--eviction-window says nothing with --eviction lfu"),
        (["--alpha", "1.5"], "--alpha"),
        (["--max-substituted-weight", "-0.1"], "--max-substituted-weight"),
        (["--eviction", "oldest"], "--eviction"),
        (["--eviction-window", "0"], "--eviction-window"),
    ],
)
def test_what_does_not_go_together_is_refused(kind: Either, argv: list[str], problem: str) -> None:
    with pytest.raises(SettingsError, match=problem):
        load(kind, [*MODE, *argv], prog="x")


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--prefetch", "shadow", "--no-predictor"], "--prefetch shadow needs the predictor"),
        (["--eviction", "forecast", "--no-predictor"], "--eviction forecast needs the predictor"),
        (["--prefetch", "gate", "--draft", "0"], "nothing asks the predictor with --prefetch gate: add --no-predictor"),
        (["--prefetch", "off", "--draft", "0"], "nothing asks the predictor with --prefetch off: add --no-predictor"),
    ],
)
def test_a_predictor_is_there_if_it_is_asked_and_only_then(argv: list[str], problem: str) -> None:
    with pytest.raises(SettingsError, match=problem):
        load(ServeSettings, [*MODE, *argv], prog="x")


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--no-predictor"],
        ["--prefetch", "gate", "--no-predictor"],
        ["--prefetch", "off", "--eviction", "forecast"],
        ["--prefetch", "gate", "--draft", "2"],
    ],
)
def test_what_goes_together_is_taken(argv: list[str]) -> None:
    assert load(ServeSettings, [*MODE, *argv], prog="x").mode == "importance"


@BOTH
def test_a_file_may_say_it(kind: Either, tmp_path: Path) -> None:
    file = tmp_path / "odmoe.toml"
    file.write_text('mode = "importance"\nalpha = 0.25\ncpu_share = true\n')
    settings = load(kind, ["--config", str(file)], prog="x")
    assert (settings.mode, settings.alpha, settings.cpu_share) == ("importance", 0.25, True)
