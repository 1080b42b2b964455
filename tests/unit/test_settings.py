"""Settings from flags, environment and file: who wins, what is refused, and in which words."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, SecretStr, ValidationError, model_validator
from pydantic_settings import SettingsConfigDict
from rich.console import Console

from odmoe_wire.settings import EXIT_USAGE, RoleSettings, SettingsError, _metavar, describe, load, parse, summary, table


class ShopSettings(RoleSettings):
    """A shop, for these tests."""

    model_config = SettingsConfigDict(env_prefix="ODMOE_SHOP_")

    store_dir: Path = Field(description="where the goods are")
    slots: int = Field(default=4, ge=1, description="shelves")
    patience_s: float = Field(default=1.5, gt=0, description="how long to wait")
    peers: tuple[str, ...] = Field(default=(), description="other shops")
    open_late: bool = Field(default=False, description="whether to open late")
    backend: Literal["cpu", "cuda"] = Field(default="cpu", description="kind of shelf")
    api_key: SecretStr | None = Field(default=None, description="key of the door")

    @model_validator(mode="after")
    def _late_needs_patience(self) -> "ShopSettings":
        if self.open_late and self.patience_s < 1:
            raise ValueError("--open-late needs --patience-s of at least 1")
        return self


def shop(*argv: str) -> ShopSettings:
    return load(ShopSettings, argv, prog="odmoe-shop")


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        (tmp_path / "shop.toml").write_text(text)
        return str(tmp_path / "shop.toml")

    return write


def test_flags_over_environment_over_file_over_default(
    monkeypatch: pytest.MonkeyPatch, file: Callable[[str], str]
) -> None:
    path = file('store_dir = "/file"\nslots = 2\npatience_s = 2\n')
    monkeypatch.setenv("ODMOE_SHOP_SLOTS", "3")
    monkeypatch.setenv("ODMOE_SHOP_PATIENCE_S", "3")
    settings = shop("--config", path, "--patience-s", "4")
    assert (settings.store_dir, settings.slots, settings.patience_s) == (Path("/file"), 3, 4.0)
    sources = {setting.name: setting.source for setting in describe(settings)}
    assert sources == {
        "config": "flag --config",
        "store_dir": f"file {path}",
        "slots": "variable ODMOE_SHOP_SLOTS",
        "patience_s": "flag --patience-s",
        "peers": "default",
        "open_late": "default",
        "backend": "default",
        "api_key": "default",
    }


def test_the_file_may_be_named_by_the_environment(monkeypatch: pytest.MonkeyPatch, file: Callable[[str], str]) -> None:
    monkeypatch.setenv("ODMOE_SHOP_CONFIG", file('store_dir = "/file"'))
    assert shop().store_dir == Path("/file")


@pytest.mark.parametrize(
    ("argv", "peers"),
    [
        (["--peers", "a", "--peers", "b"], ("a", "b")),
        (["--peers", "a,b"], ("a", "b")),
        ([], ()),
    ],
)
def test_lists_by_flag(argv: list[str], peers: tuple[str, ...]) -> None:
    assert shop("--store-dir", "/x", *argv).peers == peers


@pytest.mark.parametrize("text", ["a,b", "a, b", json.dumps(["a", "b"])])
def test_lists_by_variable(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("ODMOE_SHOP_PEERS", text)
    assert shop("--store-dir", "/x").peers == ("a", "b")


def test_yes_and_no() -> None:
    assert shop("--store-dir", "/x", "--open-late").open_late
    assert not shop("--store-dir", "/x", "--no-open-late").open_late


def test_an_empty_variable_is_none_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ODMOE_SHOP_SLOTS", "")
    assert shop("--store-dir", "/x").slots == 4


def test_objects_made_in_code_take_nothing_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ODMOE_SHOP_SLOTS", "3")
    settings = ShopSettings(store_dir=Path("/x"), patience_s=2.0)
    assert settings.slots == 4
    assert {s.name: s.source for s in describe(settings)}["patience_s"] == "code"
    with pytest.raises(ValidationError, match="frozen"):
        settings.slots = 5


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        ([], r"--store-dir is required \(or ODMOE_SHOP_STORE_DIR, or store_dir in the file\): where the goods are"),
        (["--store-dir", "/x", "--slots", "0"], "flag --slots: input should be greater than or equal to 1, not '0'"),
        (["--store-dir", "/x", "--slots", "many"], "flag --slots: .*integer.*'many'"),
        (["--store-dir", "/x", "--backend", "tpu"], "flag --backend: input should be 'cpu' or 'cuda', not 'tpu'"),
        (["--store-dir", "/x", "--slot", "3"], r"unknown argument --slot 3; did you mean --slots\?"),
        (["--store-dir", "/x", "--slits=3"], r"unknown argument --slits=3; did you mean --slots\?"),
        (["--store-dir", "/x", "extra"], "unknown argument extra"),
        (["--store-dir"], "--store-dir: expected one argument"),
        (["--store-dir", "/x", "--open-late", "--patience-s", "0.5"], "^--open-late needs --patience-s"),
        (["--config", "/nowhere/x.toml"], "cannot read the settings file /nowhere/x.toml"),
    ],
)  # fmt: skip
def test_what_is_refused_by_flag(argv: list[str], problem: str) -> None:
    with pytest.raises(SettingsError, match=problem):
        shop(*argv)


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("ODMOE_SHOP_SLOTS", "x", "variable ODMOE_SHOP_SLOTS: .*integer.*'x'"),
        ("ODMOE_SHOP_SLOT", "3", r"unknown variable ODMOE_SHOP_SLOT; did you mean ODMOE_SHOP_SLOTS\?"),
        ("ODMOE_SHOP_PEERS", '["a"', "variable ODMOE_SHOP_PEERS"),
        ("ODMOE_SHOP_PEERS", '{"a": 1}', "variable ODMOE_SHOP_PEERS"),
    ],
)
def test_what_is_refused_by_variable(monkeypatch: pytest.MonkeyPatch, name: str, value: str, problem: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=problem):
        shop("--store-dir", "/x")


def test_variables_of_other_roles_are_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ODMOE_SHOPPER_SLOT", "3")
    monkeypatch.setenv("ODMOE_NODE_SLOT", "3")
    assert shop("--store-dir", "/x").slots == 4


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("slots = 0", r"file .*shop\.toml, key slots: input should be greater than or equal to 1, not 0"),
        ("slts = 3", r"unknown key in .*shop\.toml: slts; did you mean slots\?"),
        ('config = "other.toml"', "unknown key in .*: config"),
        ("slots = ", "cannot read the settings file"),
    ],
)
def test_what_is_refused_by_file(file: Callable[[str], str], text: str, problem: str) -> None:
    with pytest.raises(SettingsError, match=problem):
        shop("--store-dir", "/x", "--config", file(text))


def test_parse_prints_a_line_for_each_problem_and_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(ShopSettings, ["--slots", "0", "--patience-s", "-1"], prog="odmoe-shop")
    assert ended.value.code == EXIT_USAGE
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("odmoe-shop: ") for line in lines)
    assert lines[-1] == "odmoe-shop: see odmoe-shop --help"


def test_help_names_flags_units_defaults_and_variables(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(ShopSettings, ["--help"], prog="odmoe-shop")
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "A shop, for these tests." in text
    assert "--patience-s SECONDS how long to wait (default: 1.5) [env: ODMOE_SHOP_PATIENCE_S]" in text
    assert "--slots N shelves (default: 4) [env: ODMOE_SHOP_SLOTS]" in text
    assert "--store-dir DIR where the goods are (required)" in text
    assert "--backend {cpu,cuda}" in text
    assert "default: None" not in text


@pytest.mark.parametrize(("name", "unit"), [("patience_s", "SECONDS"), ("tokens_per_s", "X"), ("link_gb_per_s", "X")])
def test_a_rate_is_no_time(name: str, unit: str) -> None:
    assert _metavar(name, "float") == unit


def test_the_summary_tells_what_is_not_as_usual() -> None:
    told = summary(shop("--store-dir", "/x"), prog="odmoe-shop")
    assert told == "odmoe-shop: store_dir /x (flag --store-dir); everything else as odmoe-shop --help says"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(ShopSettings, ["--version"], prog="odmoe-shop")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("odmoe 0.")


def test_secrets_are_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ODMOE_SHOP_API_KEY", "open-sesame")
    settings = shop("--store-dir", "/x")
    assert settings.api_key is not None
    assert settings.api_key.get_secret_value() == "open-sesame"
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(table(settings, title="odmoe-shop"))
    shown = console.export_text()
    assert "variable ODMOE_SHOP_API_KEY" in shown
    assert "open-sesame" not in shown + repr(settings) + str(describe(settings))


def test_a_wrong_secret_is_not_repeated(file: Callable[[str], str]) -> None:
    with pytest.raises(SettingsError, match="key api_key") as caught:
        shop("--store-dir", "/x", "--config", file("api_key = 987654"))
    assert "987654" not in str(caught.value)
