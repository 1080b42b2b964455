"""Clients that never stop asking: streams whose every answer is compared with transformers' own text.

Knows HTTP and the expected texts; knows nothing of faults.
"""

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, Final

import httpx
from transformers import AutoTokenizer

from chaos.ledger import Asked, Ledger, Outcome
from support.reference import reference_tokens

PROMPTS: Final = (
    "Tell me a long story",
    "What is the capital of France?",
    "Hello",
    "Count from one to one hundred, and say after each number whether it is prime, and why that is so",
)
_PATIENCE_S: Final = 120.0
_RETRY_S: Final = 0.1
_UNAVAILABLE: Final = 503


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt, how long the answer is to be, and what it must be."""

    prompt: str
    num_tokens: int
    answer: str

    def body(self) -> dict[str, Any]:
        """The request."""
        return {
            "model": "tiny",
            "messages": [{"role": "user", "content": self.prompt}],
            "temperature": 0,
            "ignore_eos": True,
            "max_tokens": self.num_tokens,
            "stream": True,
        }


def questions(checkpoint: Path, *, num_tokens: int) -> list[Question]:
    """With the answers of transformers."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    found = []
    for prompt in PROMPTS:
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        answer = tokenizer.decode(reference_tokens(checkpoint, ids, num_tokens), skip_special_tokens=True)
        assert isinstance(answer, str)
        found.append(Question(prompt=prompt, num_tokens=num_tokens, answer=answer))
    return found


class StreamFailed(Exception):
    """The answer broke off; the text says how."""


class Refused(Exception):
    """The request was not admitted."""


@dataclass(kw_only=True)
class Client:
    """Asks one question after the other until told to stop."""

    url: str
    questions: list[Question]
    ledger: Ledger
    number: int
    stopping: Callable[[], bool]
    texts: Mapping[str, str] = field(default_factory=dict)

    async def run(self) -> None:
        """Until it is to stop; the answer in hand is heard to its end."""
        turn = self.number
        limits = httpx.Timeout(_PATIENCE_S)
        async with httpx.AsyncClient(base_url=self.url, timeout=limits, trust_env=False) as http:
            while not self.stopping():
                await self._ask(http, self.questions[turn % len(self.questions)])
                turn += 1

    async def _ask(self, http: httpx.AsyncClient, question: Question) -> None:
        began_s = monotonic()
        pieces: list[str] = []
        outcome: Outcome
        detail = ""
        try:
            await self._stream(http, question, pieces)
            outcome = "right" if "".join(pieces) == question.answer else "wrong"
        except Refused as error:
            outcome, detail = "refused", str(error)
        except (StreamFailed, httpx.TransportError) as error:
            outcome, detail = "failed", f"{type(error).__name__} after {len(pieces)} pieces: {error}"
        text = "".join(pieces)
        if not question.answer.startswith(text):  # what came before it broke off must be right, too
            outcome, detail = "wrong", f"{text!r} instead of {question.answer!r}"
        self.ledger.asked.append(Asked(began_s=began_s, ended_s=monotonic(), outcome=outcome, detail=detail))
        if outcome in ("refused", "failed"):
            await asyncio.sleep(_RETRY_S)

    async def _stream(self, http: httpx.AsyncClient, question: Question, pieces: list[str]) -> None:
        try:
            request = http.build_request("POST", "/v1/chat/completions", json=question.body())
            answer = await http.send(request, stream=True)
        except httpx.ConnectError as error:
            raise Refused(str(error)) from error
        try:
            if answer.status_code == _UNAVAILABLE:
                raise Refused((await answer.aread()).decode())
            if answer.status_code != httpx.codes.OK:
                raise StreamFailed(f"{answer.status_code}: {(await answer.aread()).decode()}")
            await self._listen(answer, pieces)
        finally:
            await answer.aclose()

    async def _listen(self, answer: httpx.Response, pieces: list[str]) -> None:
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                return
            if not line.startswith("data: "):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise StreamFailed(json.dumps(event))
            if event["choices"] and (text := event["choices"][0]["delta"].get("content")):
                pieces.append(text)
                self.ledger.token_s.append(monotonic())
        raise StreamFailed("the stream ended without saying so")
