"""The real OpenAI SDK against a real uvicorn, with a scripted engine behind it."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import openai
import pytest

from odmoe_server.engine_api import QueueFull
from support.http_app import MODEL, events, text_of
from support.http_served import DEADLINE_S, running, until
from support.scripted_engine import Gate, ScriptedEngine, words

pytestmark = pytest.mark.slow


@contextmanager
def client(engine: ScriptedEngine, **options: object) -> Iterator[openai.OpenAI]:
    """An SDK client that checks every answer against its schema and does not try again."""
    with (
        running(engine, **options) as server,
        openai.OpenAI(
            base_url=f"{server.url}/v1",
            api_key="key",
            max_retries=0,
            timeout=DEADLINE_S,
            _strict_response_validation=True,
        ) as sdk,
    ):
        yield sdk


def test_a_whole_answer() -> None:
    with client(ScriptedEngine.saying("Hello 🏔.")) as sdk:
        answer = sdk.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Hi"}])
    assert answer.choices[0].message.content == "Hello 🏔."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_streamed_answer() -> None:
    with client(ScriptedEngine.saying("Hello 🏔.")) as sdk:
        chunks = list(
            sdk.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": "Hi"}],
                stream=True,
                stream_options={"include_usage": True},
            )
        )
    *parts, usage = chunks
    assert "".join(part.choices[0].delta.content or "" for part in parts) == "Hello 🏔."
    assert parts[0].choices[0].delta.role == "assistant"
    assert parts[-1].choices[0].finish_reason == "stop"
    assert usage.usage is not None
    assert usage.usage.completion_tokens == len("Hello 🏔.".encode()) + 1


def test_the_sdks_own_stream_helper() -> None:
    with (
        client(ScriptedEngine.saying("Hello")) as sdk,
        sdk.chat.completions.stream(model=MODEL, messages=[{"role": "user", "content": "Hi"}]) as stream,
    ):
        assert stream.get_final_completion().choices[0].message.content == "Hello"


def test_an_answer_can_be_sent_back() -> None:
    engine = ScriptedEngine.saying("one")
    with client(engine) as sdk:
        first = sdk.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Hi"}])
        sdk.chat.completions.create(
            model=MODEL,
            messages=[
                {"role": "user", "content": "Hi"},
                first.choices[0].message.model_dump(),  # type: ignore[list-item]
                {"role": "user", "content": "and?"},
            ],
        )
    assert len(engine.requests[1].prompt_ids) > len(engine.requests[0].prompt_ids)


def test_choices_with_log_probabilities() -> None:
    engine = ScriptedEngine.saying("Hé")
    with client(engine) as sdk:
        answer = sdk.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Hi"}],
            n=2,
            logprobs=True,
            top_logprobs=3,
            presence_penalty=0.5,
            frequency_penalty=0.5,
            logit_bias={"7": -100},
            seed=3,
            stop=["no"],
            extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 1},
        )
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert bytes(b for token in choice.logprobs.content for b in token.bytes or []).decode() == "Hé"
        assert [len(token.top_logprobs) for token in choice.logprobs.content] == [3, 3, 3]
    assert [asked.sampling.seed for asked in engine.requests] == [3, 4]


def test_streamed_choices() -> None:
    with client(ScriptedEngine.saying("Hey")) as sdk:
        said = ["", ""]
        for chunk in sdk.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Hi"}], n=2, logprobs=True, stream=True
        ):
            for choice in chunk.choices:
                said[choice.index] += choice.delta.content or ""
    assert said == ["Hey", "Hey"]


def test_text_completions() -> None:
    with client(ScriptedEngine.saying(" upon")) as sdk:
        whole = sdk.completions.create(model=MODEL, prompt=["Once", "Twice"], n=2, logprobs=2, max_tokens=5)
        assert [choice.text for choice in whole.choices] == [" upon"] * 4
        assert whole.choices[3].logprobs is not None
        assert whole.choices[3].logprobs.tokens == list(" upon")
        # As OpenAI's server, and against its SDK's own schema, chunks before the last have no finish reason.
        lenient = sdk.copy(_extra_kwargs={"_strict_response_validation": False})
        chunks = list(lenient.completions.create(model=MODEL, prompt=[1, 2, 3], stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == " upon"
        assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 5 + ["stop"]
        with pytest.raises(openai.BadRequestError) as refused:
            sdk.completions.create(model=MODEL, prompt="a", suffix="b")
        assert refused.value.param == "suffix"


def test_models() -> None:
    with client(ScriptedEngine()) as sdk:
        assert MODEL in [model.id for model in sdk.models.list()]
        assert sdk.models.retrieve(MODEL).id == MODEL


def test_errors_are_the_sdks_own() -> None:
    engine = ScriptedEngine.saying("x")
    with client(engine) as sdk:
        ask = sdk.chat.completions.create
        with pytest.raises(openai.NotFoundError) as unknown:
            ask(model="gpt-4o", messages=[{"role": "user", "content": "x"}])
        assert unknown.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as refused:
            ask(model=MODEL, messages=[{"role": "user", "content": "x"}], n=1000)
        assert refused.value.param == "n"
        with pytest.raises(openai.BadRequestError, match="extra_body"):
            ask(model=MODEL, messages=[{"role": "user", "content": "x"}], extra_body={"colour": "red"})
        engine.script = [QueueFull("full", retry_after_s=1)]
        with pytest.raises(openai.RateLimitError):
            ask(model=MODEL, messages=[{"role": "user", "content": "x"}])
        engine.unready("loading", "loading")
        with pytest.raises(openai.InternalServerError) as not_ready:
            ask(model=MODEL, messages=[{"role": "user", "content": "x"}])
        assert not_ready.value.status_code == 503


def test_a_wrong_key() -> None:
    with client(ScriptedEngine(), api_keys=("another",)) as sdk, pytest.raises(openai.AuthenticationError):
        sdk.models.list()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_the_generation(stream: bool) -> None:
    engine = ScriptedEngine(script=[*words("a"), Gate()])
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "stream": stream}
    with running(engine) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            content = httpx.Request("POST", server.url, json=body).content
            head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            connection.sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
            until(lambda: engine.tokens_said == 1)
            assert engine.open_generators == 1
        until(lambda: engine.open_generators == 0)


def test_headers_come_before_the_first_token() -> None:
    engine = ScriptedEngine(script=[Gate()])
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "stream": True}
    with (
        running(engine, keep_alive_s=0.05) as server,
        httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=DEADLINE_S) as answer,
    ):
        assert answer.status_code == 200
        lines = answer.iter_lines()
        assert [next(lines), next(lines), next(lines)] == [": keep-alive", "", ": keep-alive"]


def test_a_stream_in_hand_is_finished_at_shutdown() -> None:
    gate = Gate()
    engine = ScriptedEngine(script=[*words("begin"), gate, *words(" end")])
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "stream": True}
    with (
        running(engine) as server,
        httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=DEADLINE_S) as answer,
    ):
        received = bytearray()
        for piece in answer.iter_bytes():
            received += piece
            if text_of(events(bytes(received))) == "begin" and not server.server.should_exit:
                server.server.should_exit = True
                until(lambda: refuses(server.url))
                server.open(gate)
    assert text_of(events(bytes(received))) == "begin end"
    assert received.endswith(b"data: [DONE]\n\n")


def refuses(url: str) -> bool:
    """Whether nobody listens any more."""
    try:
        httpx.get(f"{url}/health", timeout=1)
    except httpx.TransportError:
        return True
    return False
