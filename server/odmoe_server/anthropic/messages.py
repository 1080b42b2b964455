"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's requests answered as chats. Knows the order of checks;
neither prompts nor how an answer is written.
"""

import uuid
from dataclasses import dataclass

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from odmoe_server import bodies, openapi
from odmoe_server.anthropic.answers import MessageAnswer, MessageEvent, TokenCount
from odmoe_server.anthropic.convert import chat_body, in_our_words
from odmoe_server.anthropic.dialect import Heading, MessagesDialect
from odmoe_server.anthropic.schemas import CountRequest, MessagesRequest
from odmoe_server.openai.body import built
from odmoe_server.openai.chat import ChatService, tenant
from odmoe_server.openai.schemas import ChatRequest


@dataclass(frozen=True, kw_only=True)
class MessagesService:
    """Answers Anthropic's requests."""

    chat: ChatService

    async def answer(self, asked: MessagesRequest, *, request: Request) -> Response:
        """The response, or an exception from the error table."""
        answer_id = request.state.answer_id = f"msg_{uuid.uuid4().hex}"
        with in_our_words():
            chat = built(ChatRequest, chat_body(asked))
            prepared = await self.chat.prepare(chat, answer_id=answer_id, tenant=tenant(request))
        head = Heading(
            id=answer_id,
            model=asked.model,
            request_id=request.state.request_id,
            input_tokens=prepared.num_prompt_tokens,
            max_tokens=asked.max_tokens,
            form=prepared.form,
        )
        dialect = MessagesDialect(head)
        answerer = self.chat.answerer
        return await answerer.answer(prepared.jobs, dialect=dialect, stream=bool(asked.stream), request=request)

    async def count(self, asked: CountRequest) -> TokenCount:
        """How many tokens such a prompt has. Asks no engine."""
        self.chat.catalog.check(asked.model)
        with in_our_words():
            chat = built(ChatRequest, chat_body(asked))
            chat.check(self.chat.answerer.limits)
            return TokenCount(input_tokens=len(await self.chat.prompt_ids(chat)))


def add_routes(router: APIRouter, service: MessagesService, *, limit_bytes: int) -> None:
    """Anthropic's addresses."""

    @router.post(
        "/v1/messages",
        response_model=MessageAnswer,
        responses=openapi.streamed(MessageEvent),
        openapi_extra=openapi.body_of(MessagesRequest),
    )
    async def messages(request: Request) -> Response:
        """Answer a conversation as Anthropic's API does, whole or as a stream of events."""
        asked = await bodies.read(request, MessagesRequest, limit_bytes=limit_bytes)
        return await service.answer(asked, request=request)

    @router.post("/v1/messages/count_tokens", openapi_extra=openapi.body_of(CountRequest))
    async def count_tokens(request: Request) -> TokenCount:
        """How many tokens the prompt of such a request has."""
        return await service.count(await bodies.read(request, CountRequest, limit_bytes=limit_bytes))
