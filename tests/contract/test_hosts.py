"""The Host header: which names a server answers to, and what the others get."""

import pytest

from odmoe_server.config import ServerSettings
from odmoe_server.hosts import ANY, OF_THIS_MACHINE, is_allowed, names_allowed
from odmoe_wire.settings import load
from support.http_app import CHAT, app_of, asking, request
from support.scripted_engine import ScriptedEngine

NAMES = ("llm.example.org", "*.svc.local")


@pytest.mark.parametrize(
    ("header", "allowed"),
    [
        ("llm.example.org", True),
        ("LLM.Example.org:8000", True),
        ("llm.example.org.", True),
        ("a.svc.local", True),
        ("svc.local", False),
        ("evilsvc.local", False),
        ("llm.example.org.evil.example", False),
        ("evil.example", False),
        ("127.0.0.1:8000", True),
        ("[::1]:8000", True),
        ("10.1.2.3", True),
        ("127.0.0.1.evil.example", False),
        ("[::1", False),
        ("llm.example.org@evil.example", False),
        ("", False),
        (None, False),
    ],
)
def test_what_a_server_answers_to(header: str | None, allowed: bool) -> None:
    assert is_allowed(header, NAMES) is allowed
    assert is_allowed(header, ANY)


@pytest.mark.parametrize(
    ("said", "host", "has_keys", "names"),
    [
        ((), "127.0.0.1", False, OF_THIS_MACHINE),
        ((), "localhost", False, OF_THIS_MACHINE),
        ((), "::1", False, OF_THIS_MACHINE),
        ((), "127.0.0.1", True, ANY),
        ((), "0.0.0.0", False, ANY),
        ((), "::", False, ANY),
        ((), "server", False, ANY),
        (("LLM.example.org",), "127.0.0.1", False, ("llm.example.org",)),
        (("llm.example.org",), "0.0.0.0", True, ("llm.example.org",)),
    ],
)
def test_the_default_is_strict_where_a_browser_of_this_machine_is_all_that_is_between(
    said: tuple[str, ...], host: str, has_keys: bool, names: tuple[str, ...]
) -> None:
    assert names_allowed(said, host=host, has_keys=has_keys) == names


def test_a_page_from_elsewhere_gets_an_openai_error_and_the_engine_is_not_asked() -> None:
    engine = ScriptedEngine.saying("must not be asked")
    app = app_of(engine, allowed_hosts=OF_THIS_MACHINE)
    refused = request(app, "POST", CHAT, json=asking(), headers={"host": "evil.example"})
    assert refused.status_code == 403
    assert refused.json()["error"]["code"] == "host_not_allowed"
    assert refused.headers["x-request-id"]
    assert engine.requests == []
    for path in ("/health", "/v1/models", "/metrics", "/"):
        assert request(app, "GET", path, headers={"host": "evil.example"}).status_code == 403
        assert request(app, "GET", path, headers={"host": "localhost:8000"}).status_code != 403


def test_the_option_is_a_list_between_commas() -> None:
    assert ServerSettings().allowed_hosts == ()
    settings = load(ServerSettings, ["--allowed-hosts", "a.example, *.b.example"], prog="x")
    assert settings.allowed_hosts == ("a.example", "*.b.example")
