"""POST /v1/chat/completions: from a checked request to a generation, and back as a body or a stream.

Knows the engine's interface, the text codec and the order of checks (cheap ones first, nothing is tokenised for a
server that cannot answer). Does not know sampling, queues or nodes.
"""

import logging
import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response

from odmoe_server.catalog import Catalog
from odmoe_server.engine_api import Engine, GenerationRequest, NotReady, Sampling
from odmoe_server.generation import Ending, Piece, generate_text
from odmoe_server.metrics import Meter, Metrics
from odmoe_server.openai import render
from odmoe_server.openai.errors import SHUTTING_DOWN, ContextTooLong, InvalidRequest
from odmoe_server.openai.schemas import ChatRequest
from odmoe_server.sse import CLIENT_GONE_STATUS, KEEP_ALIVE, ClientGone, EventStream, Pull, unless_client_leaves
from odmoe_server.text import TextCodec, TextError

log = logging.getLogger(__name__)

# How long an answer's headers wait for the engine to say that the request is refused. It says so at once.
ADMISSION_S = 0.1


@dataclass(frozen=True, kw_only=True)
class ChatService:
    """Answers chat requests. `keep_alive_s` is the longest silence in a stream."""

    engine: Engine
    text: TextCodec
    catalog: Catalog
    metrics: Metrics
    keep_alive_s: float

    async def answer(self, chat: ChatRequest, *, request: Request) -> Response:
        """The response, or an exception from the error table. `request` tells whether the client is still there."""
        self.catalog.check(chat.model)
        health = self.engine.health()
        if health.state != "ready":
            raise NotReady(f"The server is not ready: {health.detail}")
        meter = Meter(self.metrics)
        # Not the client's request id, which may come twice.
        answer_id = request.state.answer_id = f"chatcmpl-{uuid.uuid4().hex}"
        generation = self._generate(await self._generation_request(chat, answer_id), chat=chat, meter=meter)
        head = render.Letterhead(
            id=answer_id,
            created=int(time.time()),
            model=chat.model,
            system_fingerprint=self.catalog.fingerprint,
        )
        if chat.stream:
            return await self._stream(generation, head, include_usage=chat.wants_usage)
        return await self._whole(generation, head, request)

    def _generate(
        self, request: GenerationRequest, *, chat: ChatRequest, meter: Meter
    ) -> AsyncGenerator[Piece | Ending, None]:
        return generate_text(
            self.engine, request, detokeniser=self.text.detokeniser(), stops=chat.stop or (), meter=meter
        )

    async def _generation_request(self, chat: ChatRequest, answer_id: str) -> GenerationRequest:
        messages = [{"role": message.role, "content": message.text()} for message in chat.messages]
        try:
            prompt_ids = await self.text.prompt_ids(messages)
        except TextError as error:
            raise InvalidRequest(str(error), param="messages") from error
        room = self.engine.context_length - len(prompt_ids)
        if room < 1:
            raise ContextTooLong(
                f"This model's maximum context length is {self.engine.context_length} tokens. However, your messages"
                f" resulted in {len(prompt_ids)} tokens, which leaves no room for an answer. Please shorten them.",
                param="messages",
            )
        return GenerationRequest(
            request_id=answer_id,
            prompt_ids=prompt_ids,
            max_tokens=min(chat.token_limit or room, room),
            sampling=self._sampling(chat),
        )

    def _sampling(self, chat: ChatRequest) -> Sampling:
        default = self.catalog.sampling
        return Sampling(
            temperature=default.temperature if chat.temperature is None else chat.temperature,
            top_p=default.top_p if chat.top_p is None else chat.top_p,
            seed=chat.seed,
            ignore_eos=bool(chat.ignore_eos),
        )

    async def _whole(
        self, generation: AsyncGenerator[Piece | Ending, None], head: render.Letterhead, request: Request
    ) -> Response:
        try:
            text, ending = await unless_client_leaves(_collect(generation), receive=request.receive)
        except ClientGone:
            return Response(status_code=CLIENT_GONE_STATUS)
        return Response(render.body(head, text=text, ending=ending), media_type="application/json")

    async def _stream(
        self, generation: AsyncGenerator[Piece | Ending, None], head: render.Letterhead, *, include_usage: bool
    ) -> EventStream:
        parts = Pull(generation)
        try:
            first = await parts.next(within_s=ADMISSION_S)
        except BaseException:
            await parts.aclose()
            raise
        writer = render.ChunkWriter(head, include_usage=include_usage)
        return EventStream(
            self._events(parts, first=first, writer=writer),
            close=parts.aclose,
            farewell=render.error_event(NotReady(SHUTTING_DOWN)),
        )

    async def _events(
        self, parts: Pull[Piece | Ending], *, first: Piece | Ending | None, writer: render.ChunkWriter
    ) -> AsyncGenerator[bytes, None]:
        part = first
        try:
            while True:
                if part is None:
                    yield KEEP_ALIVE
                else:
                    for event in writer.write(part):
                        yield event
                    if isinstance(part, Ending):
                        return
                part = await parts.next(within_s=self.keep_alive_s)
        except Exception as error:  # the headers are out: the stream itself must say what happened
            log.exception("the stream of %s broke off", writer.head.id)
            yield render.error_event(error)


async def _collect(generation: AsyncGenerator[Piece | Ending, None]) -> tuple[str, Ending]:
    text: list[str] = []
    try:
        async for part in generation:
            if isinstance(part, Ending):
                return "".join(text), part
            text.append(part.text)
    finally:
        await generation.aclose()
    raise AssertionError("a generation ends with an Ending or an exception")
