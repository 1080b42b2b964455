"""From generations to a response: n of them side by side, whole or as a stream of events, in any client's dialect.

Knows the engine's interface, waiting and limits. Does not know how anything is written: a `Dialect` does.
"""

import logging
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from starlette.requests import Request
from starlette.responses import Response

from odmoe_server.assembly import Piece
from odmoe_server.engine_api import Engine, EngineHealth, NotReady, QueueFull, Token
from odmoe_server.generation import Ending, Job, generate_text
from odmoe_server.limits import ServiceLimits
from odmoe_server.metrics import Meter, Metrics
from odmoe_server.openai.errors import SHUTTING_DOWN, ContextTooLong
from odmoe_server.pump import Pump
from odmoe_server.sse import CLIENT_GONE_STATUS, KEEP_ALIVE, ClientGone, EventStream, unless_client_leaves
from odmoe_server.text import TextCodec

log = logging.getLogger(__name__)

# How long an answer's headers wait for the engine to say that the request is refused. It says so at once.
ADMISSION_S: Final = 0.1
_QUEUE_RETRY_S: Final = 2.0


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One generation, whole."""

    text: str
    tokens: tuple[Token, ...]
    ending: Ending
    prompt: tuple[Token, ...] = ()
    ids: tuple[int, ...] = ()


class Dialect(Protocol):
    """How one response is written; one for each response, so that it may keep what it has written so far."""

    def events(self, index: int, part: Piece | Ending) -> Iterable[bytes]:
        """Server-sent events for one part of the answer with this number."""
        ...

    def closing(self) -> Iterable[bytes]:
        """Those behind the last answer's ending."""
        ...

    def error_event(self, error: Exception) -> bytes:
        """What a stream ends with when it breaks off."""
        ...

    def body(self, answers: Sequence[Answer]) -> bytes:
        """The whole response, as JSON."""
        ...


@dataclass(frozen=True, kw_only=True)
class Answerer:
    """Runs generations for every route. `keep_alive_s` is the longest silence in a stream."""

    engine: Engine
    text: TextCodec
    metrics: Metrics
    keep_alive_s: float
    limits: ServiceLimits

    def check_ready(self, *, num_answers: int = 1) -> None:
        """Before anything costly is done for a request. Raises NotReady or QueueFull."""
        health: EngineHealth = self.engine.health()
        if health.state != "ready":
            raise NotReady(f"The server is not ready: {health.detail}")
        # Where nobody waits, the engine knows better how many it can take.
        if health.queued and health.queued + num_answers > self.limits.max_queued:
            raise QueueFull(f"{health.queued} requests are waiting already", retry_after_s=_QUEUE_RETRY_S)

    def room(self, prompt_ids: Sequence[int], *, wanted: int | None, param: str) -> int:
        """How many tokens an answer to this prompt may have. Raises ContextTooLong."""
        room = self.engine.context_length - len(prompt_ids)
        if room < (0 if wanted == 0 else 1):
            raise ContextTooLong(
                f"This model's maximum context length is {self.engine.context_length} tokens. However, your {param}"
                f" resulted in {len(prompt_ids)} tokens, which leaves no room for an answer. Please shorten them.",
                param=param,
            )
        return room if wanted is None else min(wanted, room)

    async def answer(self, jobs: Sequence[Job], *, dialect: Dialect, stream: bool, request: Request) -> Response:
        """The response, or an exception from the error table. All `jobs` run at once; if one fails, none is answered.
        `request` tells whether the client is still there."""
        pump = self._pump(jobs)
        if stream:
            return await self._stream(pump, dialect, num_answers=len(jobs))
        try:
            answers = await unless_client_leaves(_collect(pump, len(jobs)), receive=request.receive)
        except ClientGone:
            return Response(status_code=CLIENT_GONE_STATUS)
        return Response(dialect.body(answers), media_type="application/json")

    def _pump(self, jobs: Sequence[Job]) -> Pump[Piece | Ending]:
        sources = [generate_text(self.engine, job, text=self.text, meter=Meter(self.metrics)) for job in jobs]
        return Pump(sources, first_s=self.limits.max_wait_s, rest_s=self.limits.max_answer_s)

    async def _stream(self, pump: Pump[Piece | Ending], dialect: Dialect, *, num_answers: int) -> EventStream:
        try:
            first = await pump.take(within_s=ADMISSION_S)
        except BaseException:
            await pump.aclose()
            raise
        return EventStream(
            self._events(pump, dialect, first=first, num_answers=num_answers),
            close=pump.aclose,
            farewell=lambda: dialect.error_event(NotReady(SHUTTING_DOWN)),
        )

    async def _events(
        self,
        pump: Pump[Piece | Ending],
        dialect: Dialect,
        *,
        first: list[tuple[int, Piece | Ending]],
        num_answers: int,
    ) -> AsyncGenerator[bytes, None]:
        parts, num_open = first, num_answers
        try:
            while True:
                written = [event for index, part in parts for event in dialect.events(index, part)]
                num_open -= sum(isinstance(part, Ending) for _, part in parts)
                if not num_open:
                    yield b"".join([*written, *dialect.closing()])
                    return
                yield b"".join(written) if parts else KEEP_ALIVE
                parts = await pump.take(within_s=self.keep_alive_s)
        except Exception as error:  # the headers are out: the stream itself must say what happened
            log.exception("a stream broke off")
            yield dialect.error_event(error)


async def _collect(pump: Pump[Piece | Ending], num_answers: int) -> list[Answer]:
    pieces: list[list[Piece]] = [[] for _ in range(num_answers)]
    endings: dict[int, Ending] = {}
    try:
        while len(endings) < num_answers:
            for index, part in await pump.take(within_s=None):
                if isinstance(part, Ending):
                    endings[index] = part
                else:
                    pieces[index].append(part)
    finally:
        await pump.aclose()
    return [
        Answer(
            text="".join(piece.text for piece in pieces[index]),
            tokens=tuple(token for piece in pieces[index] for token in piece.tokens),
            ending=endings[index],
            prompt=tuple(token for piece in pieces[index] for token in piece.prompt),
            ids=(*(token_id for piece in pieces[index] for token_id in piece.ids), *endings[index].ids),
        )
        for index in range(num_answers)
    ]
