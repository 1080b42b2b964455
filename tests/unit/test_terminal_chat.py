"""The terminal chat against a scripted transport: what it sends, what it shows, what it says when things fail."""

import io
import json
from collections.abc import Callable

import httpx
import pytest
from rich.console import Console

from odmoe_server import chat

Answer = Callable[[httpx.Request], httpx.Response]


def conversation(answer: Answer, **options: object) -> chat.Conversation:
    client = httpx.Client(transport=httpx.MockTransport(answer), base_url="http://server")
    return chat.Conversation(client=client, model="m", options=dict(options))


def streamed(*pieces: str, end: str = "data: [DONE]\n\n") -> httpx.Response:
    deltas = [{"role": "assistant", "content": ""}, *({"content": piece} for piece in pieces), {}]
    lines = [f"data: {json.dumps({'choices': [{'delta': delta}]})}\n\n" for delta in deltas]
    return httpx.Response(200, text=": keep-alive\n\n" + "".join(lines) + end)


def test_a_conversation_goes_on() -> None:
    sent = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(json.loads(request.content))
        return streamed("Hel", "lo")

    talk = conversation(answer, temperature=0)
    assert list(talk.ask("Hi")) == ["Hel", "lo"]
    list(talk.ask("And?"))
    assert sent[0] == {
        "model": "m",
        "messages": [{"role": "user", "content": "Hi"}],
        "stream": True,
        "temperature": 0,
    }
    assert sent[1]["messages"] == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "And?"},
    ]


def test_a_stopped_answer_is_remembered_as_far_as_it_came() -> None:
    talk = conversation(lambda request: streamed("one", "two"))
    pieces = talk.ask("Hi")
    next(pieces)
    pieces.close()
    assert talk.messages[-1] == {"role": "assistant", "content": "one"}


def refuse(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("refused", request=request)


def vanish(request: httpx.Request) -> httpx.Response:
    raise httpx.ReadError("reset", request=request)


def stay_silent(request: httpx.Request) -> httpx.Response:
    raise httpx.ReadTimeout("", request=request)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (refuse, "odmoe serve"),
        (vanish, "went away; start it again"),
        (stay_silent, "is silent; see what it does: odmoe status"),
        (lambda request: httpx.Response(503, json={"error": {"message": "loading"}}), r"loading \(status 503\)"),
        (lambda request: httpx.Response(502, text="<html>"), r"with --url \(status 502\)"),
        (lambda request: streamed("a", end='data: {"error": {"message": "lost"}}\n\n'), "lost"),
        (lambda request: streamed("a", end=""), "in the middle"),
        (lambda request: httpx.Response(200, text="data: no json\n\n"), "does not look like"),
    ],
)
def test_failures_in_words(answer: Answer, says: str) -> None:
    talk = conversation(answer)
    with pytest.raises(chat.ChatError, match=says):
        list(talk.ask("Hi"))


def test_an_address_without_its_scheme() -> None:
    with chat.connect("localhost:8000", api_key=None) as client, pytest.raises(chat.ChatError, match="--url begins"):
        chat.first_model(client)


def test_the_first_model() -> None:
    talk = conversation(lambda request: httpx.Response(200, json={"data": [{"id": "first"}, {"id": "second"}]}))
    assert chat.first_model(talk.client) == "first"


@pytest.mark.parametrize("url", ["http://a:1", "http://a:1/", "http://a:1/v1", "http://a:1/v1/"])
def test_addresses(url: str) -> None:
    with chat.connect(url, api_key="k") as client:
        request = client.build_request("GET", "/v1/models")
    assert str(request.url) == "http://a:1/v1/models"
    assert request.headers["authorization"] == "Bearer k"


def screen(talk: chat.Conversation, *typed: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What is on the terminal after someone typed this and Ctrl-D."""
    lines = iter(typed)
    output = io.StringIO()
    console = Console(file=output, width=80)

    def read(*args: object, **kwargs: object) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(console, "input", read)
    chat.interactive(talk, console=console)
    return output.getvalue()


def test_typing(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = conversation(lambda request: streamed("[bold]as it is[/]"))
    shown = screen(talk, "Hi", "", "/help", monkeypatch=monkeypatch)
    assert "[bold]as it is[/]\n" in shown
    assert shown.count("/clear") == 2
    assert len(talk.messages) == 2


def test_an_answer_has_no_power_over_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = conversation(lambda request: streamed("a\x1b[2Jb\x07\x9b1mc\td\r"))
    assert "a[2Jb1mc" in screen(talk, "Hi", monkeypatch=monkeypatch)


def test_clear_keeps_the_system_message(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = conversation(lambda request: streamed("x"))
    talk.messages = [{"role": "system", "content": "s"}]
    screen(talk, "Hi", "/clear", "/exit", "never sent", monkeypatch=monkeypatch)
    assert talk.messages == [{"role": "system", "content": "s"}]


def test_an_error_does_not_end_the_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([httpx.Response(503, json={"error": {"message": "loading"}}), streamed("there")])
    talk = conversation(lambda request: next(answers))
    shown = screen(talk, "Hi", "Hi again", monkeypatch=monkeypatch)
    assert "loading" in shown
    assert "there" in shown
