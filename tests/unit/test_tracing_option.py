"""Whether there are traces: off by default, on by option or variable, a clear word where the packages are missing."""

import builtins
import logging
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from odmoe_server.config import ServerSettings, ServeSettings
from odmoe_server.tracing.option import open_tracing, traces_url
from odmoe_wire.settings import SettingsError, load

VARIABLE = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without OpenTelemetry."""
    monkeypatch.delitem(sys.modules, "odmoe_server.tracing.spans", raising=False)
    original = builtins.__import__

    def refuse(name: str, *args: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "opentelemetry":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return original(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {**VARIABLE, "OTEL_SDK_DISABLED": "true"},
        {**VARIABLE, "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_off_unless_a_collector_is_named(environ: Mapping[str, str], missing: None) -> None:
    assert open_tracing(None, environ=environ) is None


def test_the_option_without_the_package_says_what_to_install(missing: None) -> None:
    with pytest.raises(ValueError, match=r"--otlp-endpoint needs OpenTelemetry.*pip install 'odmoe\[server,otel\]'"):
        open_tracing("http://127.0.0.1:9", environ={})


def test_the_variable_without_the_package_is_a_warning(missing: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert open_tracing(None, environ=VARIABLE) is None
    assert "OTEL_EXPORTER_OTLP_ENDPOINT is set" in caplog.text


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("http://c:4318", "http://c:4318/v1/traces"),
        ("http://c:4318/", "http://c:4318/v1/traces"),
        ("https://c/otlp/v1/traces", "https://c/otlp/v1/traces"),
    ],
)
def test_where_a_collector_takes_traces(endpoint: str, url: str) -> None:
    assert traces_url(endpoint) == url


@pytest.mark.parametrize("kind", [ServerSettings, ServeSettings])
def test_both_commands_have_the_option(kind: type[ServerSettings] | type[ServeSettings]) -> None:
    assert kind().otlp_endpoint is None
    assert load(kind, ["--otlp-endpoint", "http://c:4318"], prog="x").otlp_endpoint == "http://c:4318"
    with pytest.raises(SettingsError, match="--otlp-endpoint"):
        load(kind, ["--otlp-endpoint", "c:4318"], prog="x")
