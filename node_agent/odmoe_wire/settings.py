"""One frozen settings object per role, out of flags, environment and a TOML file. Knows no role.

Flags win over the environment, the environment over the file, the file over defaults. An unknown flag, variable or
key is refused, never ignored. An object built in code (`NodeSettings(slots=2)`) takes nothing from outside.
"""

import argparse
import difflib
import os
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar

from pydantic import Field, PrivateAttr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)
from rich.table import Table

EXIT_USAGE: Final = 2
# What a flag's value is, by the unit that ends its name; else by its type.
_UNITS = {
    "_per_s": "X",
    "_s": "SECONDS",
    "_ms": "MILLISECONDS",
    "_mb": "MB",
    "_bytes": "BYTES",
    "_file": "FILE",
    "_dir": "DIR",
    "endpoint": "ENDPOINT",
}
_TYPES = {"Path": "PATH", "int": "N", "float": "X"}


class RoleSettings(BaseSettings):
    """Base of every role's settings.

    A role sets `env_prefix` (such as ODMOE_NODE_) and gives every field a description; its docstring opens the
    help text. Only `parse` reads flags, environment and file.
    """

    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_ignore_empty=True, validate_default=True)

    config: Path | None = Field(default=None, description="TOML file with settings, keys as the flags with _ for -")

    _sources: dict[str, str] = PrivateAttr(default_factory=dict)

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *_: Any, **__: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments only: what `parse` read comes in as such."""
        return (init_settings,)


SettingsT = TypeVar("SettingsT", bound=RoleSettings)


class SettingsError(ValueError):
    """Settings that cannot be used; one line for each problem, naming the flag, variable or key."""


@dataclass(frozen=True)
class Setting:
    """One effective setting, as text fit to be shown: secrets are masked."""

    name: str
    value: str
    source: str


def parse(cls: type[SettingsT], argv: Sequence[str], *, prog: str) -> SettingsT:
    """Settings from flags `argv`, environment and file. Ends the process with status 2 and a line for each problem
    when they cannot be used, with 0 after --help and --version. `prog` is the command's name in those texts."""
    try:
        return load(cls, argv, prog=prog)
    except SettingsError as error:
        for line in str(error).splitlines():
            print(f"{prog}: {line}", file=sys.stderr)
        print(f"{prog}: see {prog} --help", file=sys.stderr)
        raise SystemExit(EXIT_USAGE) from None


def load(cls: type[SettingsT], argv: Sequence[str], *, prog: str) -> SettingsT:
    """What `parse` does, raising `SettingsError` instead of ending the process."""
    flags = _read_flags(cls, argv, prog=prog)
    environment = _read_environment(cls)
    config = flags.get("config") or environment.get("config")
    file = _read_file(cls, Path(config)) if config else {}
    values = {**file, **environment, **flags}
    sources = {
        **dict.fromkeys(file, f"file {config}"),
        **{name: f"variable {_variable(cls, name)}" for name in environment},
        **{name: f"flag {_flag(name)}" for name in flags},
    }
    try:
        settings = cls(**values)
    except ValidationError as error:
        raise SettingsError("\n".join(_explain(cls, error, sources))) from None
    settings._sources.update(sources)
    return settings


def refuse_unused(settings: RoleSettings, *, choice: str, uses: Mapping[str, Sequence[str]]) -> None:
    """`uses` says for which values of the setting `choice` others mean anything. Raises ValueError for one that was
    given although it says nothing with the value chosen; for validators of settings."""
    chosen = getattr(settings, choice)
    for name, values in uses.items():
        given = name in settings.model_fields_set and getattr(settings, name) is not None
        if given and chosen not in values:
            raise ValueError(f"{_flag(name)} says nothing with {_flag(choice)} {chosen}; it is for {', '.join(values)}")


def describe(settings: RoleSettings) -> list[Setting]:
    """Every setting with its value and where it came from, in the order of declaration."""
    shown = []
    for name in type(settings).model_fields:
        source = settings._sources.get(name, "code" if name in settings.model_fields_set else "default")
        value = getattr(settings, name)
        shown.append(Setting(name, "-" if value in (None, ()) else str(value), source))
    return shown


def table(settings: RoleSettings, *, title: str) -> Table:
    """`describe` as a rich table."""
    grid = Table("setting", "value", "from", title=title, title_justify="left")
    for setting in describe(settings):
        style = "dim" if setting.source == "default" else None
        grid.add_row(setting.name, setting.value, setting.source, style=style)
    return grid


def summary(settings: RoleSettings, *, prog: str) -> str:
    """What differs from the defaults, in a line, for who starts `prog` by hand and did not ask for a table."""
    given = [f"{s.name} {s.value} ({s.source})" for s in describe(settings) if s.source != "default"]
    return f"{prog}: {', '.join(given) or 'no setting given'}; everything else as {prog} --help says"


class _Parser(argparse.ArgumentParser):
    """argparse that raises instead of exiting and says what was probably meant."""

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            known = [flag for action in self._actions for flag in action.option_strings]
            message = f"unknown argument {unknown}{_did_you_mean(unknown.split()[0].partition('=')[0], known)}"
        raise SettingsError(message)


def _add_argument(parser: argparse.ArgumentParser, *flags: str, **options: Any) -> argparse.Action:
    """Called by pydantic-settings for each field: says what kind of value is meant in place of its Python type."""
    options["help"] = str(options.get("help", "")).replace(" (default: None)", "").replace(" (default: ())", "")
    if "metavar" in options and "choices" not in options:
        options["metavar"] = _metavar(flags[-1].lstrip("-").replace("-", "_"), str(options["metavar"]))
    return parser.add_argument(*flags, **options)


def _metavar(name: str, type_name: str) -> str:
    if type_name.startswith("{"):
        return type_name
    unit = next((word for suffix, word in _UNITS.items() if name.endswith(suffix)), None)
    return unit or _TYPES.get(type_name, "VALUE")


class _Environment(EnvSettingsSource):
    """The environment; a list may be written as a,b besides JSON."""

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        """JSON when it looks like JSON, else the parts between commas; pydantic judges the outcome."""
        if not str(value).lstrip().startswith(("[", "{")):
            return [part.strip() for part in str(value).split(",")]
        try:
            return super().decode_complex_value(field_name, field, value)
        except ValueError:
            return value


def _read_flags(cls: type[RoleSettings], argv: Sequence[str], *, prog: str) -> dict[str, Any]:
    parser = _Parser(
        prog=prog, description=cls.__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"odmoe {version('odmoe')}")
    source: CliSettingsSource[argparse.ArgumentParser] = CliSettingsSource(
        cls,
        cli_parse_args=list(argv),
        cli_prog_name=prog,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_show_env_vars=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        root_parser=parser,
        add_argument_method=_add_argument,
    )
    return source()


def _read_environment(cls: type[RoleSettings]) -> dict[str, Any]:
    known = [_variable(cls, name) for name in cls.model_fields]
    prefix = _variable(cls, "")
    assert prefix, f"{cls.__name__} sets no env_prefix"
    given = [name for name in os.environ if name.upper().startswith(prefix)]
    _refuse_unknown("variable", [name for name in given if name.upper() not in known], known)
    return _Environment(cls)()


def _read_file(cls: type[RoleSettings], path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(f"cannot read the settings file {path}: {error}") from None
    known = [name for name in cls.model_fields if name != "config"]
    _refuse_unknown(f"key in {path}:", [name for name in values if name not in known], known)
    return values


def _refuse_unknown(kind: str, unknown: Iterable[str], known: Sequence[str]) -> None:
    lines = [f"unknown {kind} {name}{_did_you_mean(name, known)}" for name in unknown]
    if lines:
        raise SettingsError("\n".join(lines))


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _explain(cls: type[RoleSettings], error: ValidationError, sources: Mapping[str, str]) -> Iterable[str]:
    """A line for each problem: where the value came from, what was wrong, what is allowed."""
    for problem in error.errors(include_url=False, include_context=False):
        name = str(problem["loc"][0]) if problem["loc"] else ""
        what = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "missing":
            description = cls.model_fields[name].description or name
            yield f"{_flag(name)} is required (or {_variable(cls, name)}, or {name} in the file): {description}"
        elif not name:
            yield what
        else:
            secret = "Secret" in str(cls.model_fields[name].annotation)
            given = "" if secret else f", not {problem['input']!r}"
            where = sources.get(name, name)
            key = f", key {name}" if where.startswith("file ") else ""
            yield f"{where}{key}: {what[:1].lower()}{what[1:]}{given}"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _variable(cls: type[RoleSettings], name: str) -> str:
    return (str(cls.model_config.get("env_prefix", "")) + name).upper()
