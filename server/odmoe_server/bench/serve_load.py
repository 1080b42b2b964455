"""Load on a running server: so many streams at once, as the OpenAI SDK asks, and when each token came.

Knows the API and a clock; nothing of what is behind it.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from openai import AsyncOpenAI

ANSWER_S: Final = 900.0
INSTALL: Final = "pip install 'odmoe[bench]'"
_TICK_S: Final = 0.01


class NoSdkError(ValueError):
    """The OpenAI SDK is missing; the message says how to get it."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One request: a message, and how many tokens its answer has."""

    content: str
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Told:
    """One answer: when it was asked for, when each piece of text came, and how many tokens the server counted."""

    began_s: float
    came_s: tuple[float, ...]
    tokens: int
    prompt_tokens: int

    @property
    def first_s(self) -> float:
        """From the request to its first piece."""
        return self.came_s[0] - self.began_s

    @property
    def gaps_s(self) -> list[float]:
        """From each piece to the next."""
        return [later - earlier for earlier, later in zip(self.came_s, self.came_s[1:], strict=False)]


def client(url: str) -> "AsyncOpenAI":
    """The SDK's client for a server, which does not try again. Raises NoSdkError."""
    try:
        import openai
    except ImportError as error:
        raise NoSdkError(f"this benchmark asks with the OpenAI SDK, which is missing: {INSTALL}") from error
    return openai.AsyncOpenAI(
        base_url=f"{url}/v1",
        api_key="none",
        max_retries=0,
        timeout=ANSWER_S,
        http_client=openai.DefaultAsyncHttpxClient(trust_env=False, timeout=ANSWER_S),
    )


async def ask(sdk: "AsyncOpenAI", asked: Asked, *, model: str, on_piece: Callable[[], None] = lambda: None) -> Told:
    """The greedy answer to one request, streamed."""
    began_s, came_s, usage = time.perf_counter(), [], None
    stream: Any = await sdk.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": asked.content}],
        temperature=0,
        max_tokens=asked.tokens,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    async for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            came_s.append(time.perf_counter())
            on_piece()
        usage = chunk.usage or usage
    if usage is None or not came_s:
        raise ValueError("the server streamed an answer without text or usage")
    return Told(
        began_s=began_s, came_s=tuple(came_s), tokens=usage.completion_tokens, prompt_tokens=usage.prompt_tokens
    )


async def steady(sdk: "AsyncOpenAI", streams: Sequence[Sequence[Asked]], *, model: str) -> list[Told]:
    """All streams at once; each asks its requests one after another."""

    async def one(requests: Sequence[Asked]) -> list[Told]:
        return [await ask(sdk, asked, model=model) for asked in requests]

    return [told for answers in await asyncio.gather(*map(one, streams)) for told in answers]


@dataclass(frozen=True, kw_only=True)
class Disturbed:
    """Gaps of streams that ran before a long prompt joined them, and while it was prefilled."""

    before_s: list[float]
    during_s: list[float]
    joined: Told


async def disturbed(sdk: "AsyncOpenAI", running: Sequence[Asked], joining: Asked, *, model: str) -> Disturbed:
    """Streams that run, and a request that joins when each of them has had a fourth of its answer."""
    counts = [0] * len(running)

    def count(index: int) -> Callable[[], None]:
        def on_piece() -> None:
            counts[index] += 1

        return on_piece

    tasks = [asyncio.ensure_future(ask(sdk, a, model=model, on_piece=count(i))) for i, a in enumerate(running)]
    while not all(had >= asked.tokens // 4 for had, asked in zip(counts, running, strict=True)):
        if any(task.done() for task in tasks):
            break
        await asyncio.sleep(_TICK_S)
    joined = await ask(sdk, joining, model=model)
    told = await asyncio.gather(*tasks)
    settled_s = max(answer.came_s[0] for answer in told)
    gaps = [pair for answer in told for pair in zip(answer.came_s, answer.came_s[1:], strict=False)]
    return Disturbed(
        before_s=[late - early for early, late in gaps if early >= settled_s and late <= joined.began_s],
        during_s=[late - early for early, late in gaps if late >= joined.began_s and early <= joined.came_s[0]],
        joined=joined,
    )


def summary(told: Sequence[Told]) -> dict[str, Any]:
    """Figures of a steady load, as a row has them. The time is from the first request to the last piece."""
    whole_s = max(answer.came_s[-1] for answer in told) - min(answer.began_s for answer in told)
    tokens = sum(answer.tokens for answer in told)
    each = [answer.tokens / (answer.came_s[-1] - answer.began_s) for answer in told]
    return {
        "requests": len(told),
        "prompt_tokens": sum(answer.prompt_tokens for answer in told),
        "output_tokens": tokens,
        "output_tokens_per_s": tokens / whole_s,
        "output_tokens_per_s_per_user": float(np.median(each)),
        **percentiles("ttft_ms", [answer.first_s for answer in told]),
        **percentiles("itl_ms", [gap for answer in told for gap in answer.gaps_s]),
    }


def percentiles(name: str, seconds: Sequence[float]) -> dict[str, float | None]:
    """p50, p90 and p99 in milliseconds; None of nothing."""
    return {
        f"{name}_p{rank}": float(np.percentile(seconds, rank)) * 1000 if len(seconds) else None for rank in (50, 90, 99)
    }
