"""Settings of server and serve: where they come from and what is refused."""

from pathlib import Path

import pytest

from odmoe_server.config import ServerSettings, ServeSettings
from odmoe_server.engine.align import Periods
from odmoe_server.serving import engine_options
from odmoe_wire.settings import SettingsError, load

Either = type[ServerSettings] | type[ServeSettings]
BOTH = pytest.mark.parametrize("kind", [ServerSettings, ServeSettings])


@BOTH
def test_safe_defaults(kind: Either) -> None:
    settings = kind()
    assert settings.host == "127.0.0.1"
    assert settings.model == "default"
    assert settings.served_model_names == ()


@BOTH
@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["--served-model-names", "a,b"], ("a", "b")),
        (["--served-model-names", "a", "--served-model-names", "b"], ("a", "b")),
        (["--served-model-names", " a , "], ("a",)),
    ],
)
def test_names_of_the_model(kind: Either, argv: list[str], names: tuple[str, ...]) -> None:
    assert load(kind, argv, prog="x").served_model_names == names


def test_names_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ODMOE_SERVER_SERVED_MODEL_NAMES", "a,b")
    assert load(ServerSettings, [], prog="x").served_model_names == ("a", "b")


@BOTH
@pytest.mark.parametrize(
    "argv",
    [
        ["--port", "70000"],
        ["--port", "http"],
        ["--max-body-mb", "0"],
        ["--keep-alive-s", "0"],
        ["--default-temperature", "3"],
        ["--metrics-prefix", "a b"],
        ["--log-level", "loud"],
        ["--align-token", "3"],
        ["--align-kv", "0"],
        ["--prefill-chunk", "15"],
        ["--prefill-chunk", "16385"],
        ["--prompt-kv", "none"],
        ["--slot-mode", "cache"],
    ],
)
def test_bad_values_name_the_flag(kind: Either, argv: list[str]) -> None:
    with pytest.raises(SettingsError, match=argv[0]):
        load(kind, argv, prog="x")


@pytest.mark.parametrize(
    ("argv", "periods"),
    [
        ([], Periods(token=1, kv=1)),
        (["--align-token", "4", "--align-kv", "16"], Periods(token=4, kv=16)),
        (["--align-token", "off", "--align-kv", "off"], Periods(token=None, kv=None)),
    ],
)
def test_alignment_periods_reach_the_engine(argv: list[str], periods: Periods) -> None:
    assert engine_options(load(ServerSettings, argv, prog="x")).periods == periods


def test_prefill_and_slots_reach_the_engine() -> None:
    options = engine_options(load(ServerSettings, [], prog="x"))
    assert (options.prefill_chunk, options.periods.prompt, options.slot_mode) == (256, "full", "on-demand")
    argv = ["--prefill-chunk", "64", "--prompt-kv", "own", "--slot-mode", "lru"]
    options = engine_options(load(ServerSettings, argv, prog="x"))
    assert (options.prefill_chunk, options.periods.prompt, options.slot_mode) == (64, "own", "lru")


@BOTH
def test_alignment_periods_in_a_file_may_be_numbers(kind: Either, tmp_path: Path) -> None:
    file = tmp_path / "odmoe.toml"
    file.write_text('align_token = 8\nalign_kv = "off"\n')
    settings = load(kind, ["--config", str(file)], prog="x")
    assert (settings.align_token, settings.align_kv) == ("8", "off")


@BOTH
def test_keys_are_not_shown(kind: Either) -> None:
    settings = load(kind, ["--api-key", "hidden"], prog="x")
    assert "hidden" not in repr(settings)


def test_a_file(tmp_path: Path) -> None:
    file = tmp_path / "odmoe.toml"
    file.write_text('model = "partitioned"\nnodes = 5\nserved_model_names = ["a", "b"]\n')
    settings = load(ServeSettings, ["--config", str(file), "--nodes", "3"], prog="x")
    assert (settings.model, settings.nodes, settings.served_model_names) == ("partitioned", 3, ("a", "b"))


def test_every_setting_is_explained() -> None:
    for kind in (ServerSettings, ServeSettings):
        assert all(field.description for field in kind.model_fields.values())
