"""`odmoe chat`: a small terminal chat with any server that speaks OpenAI's API. Knows HTTP and the terminal only."""

import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
from rich.console import Console

HELP = "/clear forgets the conversation, /exit or Ctrl-D ends; Ctrl-C stops an answer."
CONNECT_TIMEOUT_S = 5.0
# A server sends a comment every few seconds while it works.
SILENCE_TIMEOUT_S = 120.0
_DATA = "data: "
# An answer must not move the cursor or set the window's title.
_CONTROLS = {code: None for code in [*range(0x20), *range(0x7F, 0xA0)] if chr(code) not in "\n\t"}


class ChatError(Exception):
    """The server cannot be reached or refuses; the message is for the user."""


@dataclass(kw_only=True)
class Conversation:
    """Messages so far, and where to send them. `options` go into every request as they are."""

    client: httpx.Client
    model: str
    options: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, str]] = field(default_factory=list)

    def ask(self, question: str) -> Iterator[str]:
        """Pieces of the answer. Both go into the conversation, the answer as far as it was taken."""
        pending = [*self.messages, {"role": "user", "content": question}]
        body = {"model": self.model, "messages": pending, "stream": True, **self.options}
        answer: list[str] = []
        try:
            with _reachable(), self.client.stream("POST", "/v1/chat/completions", json=body) as response:
                _refuse_errors(response)
                for piece in _pieces(response.iter_lines()):
                    answer.append(piece)
                    yield piece
        finally:
            if answer:
                self.messages = [*pending, {"role": "assistant", "content": "".join(answer)}]


def connect(url: str, *, api_key: str | None) -> httpx.Client:
    """A client for the server at `url`, with or without /v1 at its end."""
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = httpx.Timeout(SILENCE_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    return httpx.Client(base_url=url.rstrip("/").removesuffix("/v1"), headers=headers, timeout=timeout)


def first_model(client: httpx.Client) -> str:
    """The name of the model the server serves."""
    with _reachable():
        response = client.get("/v1/models")
        _refuse_errors(response)
        return str(response.json()["data"][0]["id"])


def once(conversation: Conversation, question: str, *, console: Console) -> None:
    """One question, one answer."""
    for piece in conversation.ask(question):
        _write(console, piece)
    console.print()


def interactive(conversation: Conversation, *, console: Console) -> None:
    """Questions from the terminal until there are no more."""
    with suppress(ImportError):
        import readline  # noqa: F401 - gives input() a history and editing
    console.print(f"Talking to {conversation.model}. {HELP}", style="dim")
    while True:
        try:
            question = console.input("[bold cyan]> [/]").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if question == "/exit":
            return
        if question == "/clear":
            conversation.messages = [m for m in conversation.messages if m["role"] == "system"]
        elif question.startswith("/"):
            console.print(HELP, style="dim")
        elif question:
            _answer(conversation, question, console=console)


def _answer(conversation: Conversation, question: str, *, console: Console) -> None:
    try:
        once(conversation, question, console=console)
    except KeyboardInterrupt:
        console.print(" [dim](stopped)[/]")
    except ChatError as error:
        console.print(str(error), style="red", markup=False)


def _write(console: Console, piece: str) -> None:
    console.print(piece.translate(_CONTROLS), end="", markup=False, highlight=False, soft_wrap=True)
    console.file.flush()


def _pieces(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        if not line.startswith(_DATA):
            continue  # comments and blank lines
        if line == f"{_DATA}[DONE]":
            return
        event = json.loads(line.removeprefix(_DATA))
        if "error" in event:
            raise ChatError(event["error"]["message"])
        for choice in event["choices"]:
            if text := choice["delta"].get("content"):
                yield text
    raise ChatError("the server ended the answer in the middle")


class _reachable:  # noqa: N801 - reads as a statement
    """Network errors in words for the user."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        match error:
            case httpx.ConnectError():
                where = f"{error.request.url.scheme}://{error.request.url.netloc.decode()}"
                raise ChatError(f"no server at {where}; start one: odmoe serve") from None
            case httpx.UnsupportedProtocol():
                raise ChatError("--url begins with http:// or https://, such as http://127.0.0.1:8000") from None
            case httpx.TimeoutException():
                raise ChatError("the server is silent; see what it does: odmoe status") from None
            case httpx.RemoteProtocolError() | httpx.ReadError():
                raise ChatError("the server went away; start it again, or see what its terminal says") from None
            case httpx.HTTPError() | KeyError() | ValueError():
                raise ChatError(f"this does not look like a server of OpenAI's API: {error!r}") from error


def _refuse_errors(response: httpx.Response) -> None:
    if response.is_success:
        return
    response.read()
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        where = f"{response.url.scheme}://{response.url.netloc.decode()}"
        message = f"{where} does not answer as OpenAI's API does; name an odmoe server with --url"
    raise ChatError(f"{message} (status {response.status_code})")


def question_from_pipe() -> str | None:
    """What was piped in, if anything was."""
    return None if sys.stdin.isatty() else sys.stdin.read().strip() or None
