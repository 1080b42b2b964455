"""/v1/responses: OpenAI's newer API answered as chats, its answers kept for a while. Knows the order of checks and the
store; neither prompts nor how an answer is written.
"""

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from odmoe_server import bodies, openapi
from odmoe_server.openai.body import built
from odmoe_server.openai.chat import ChatService, tenant
from odmoe_server.openai.errors import InvalidRequest, RequestError, UnsupportedParameter
from odmoe_server.openai.renamed import renamed
from odmoe_server.openai.responses_answers import DeletedResponse, ResponseEvent, ResponseResource
from odmoe_server.openai.responses_convert import answered, chat_body, own_messages
from odmoe_server.openai.responses_dialect import Cancelled, Item, ResponsesDialect, Told, begun
from odmoe_server.openai.responses_schemas import ResponsesRequest
from odmoe_server.openai.responses_store import ResponseStore, Stored
from odmoe_server.openai.schemas import ChatRequest

# What the chat request calls a field, and what the client does.
_FIELDS = {
    "response_format.json_schema.schema": "text.format.schema",
    "function.parameters": "parameters",
    "tool_choice.function.name": "tool_choice.name",
}
_QUERIES = ("include", "starting_after", "stream", "include_obfuscation")


@dataclass(frozen=True, kw_only=True)
class ResponsesService:
    """Answers requests for responses. What is stored is gone when the process ends."""

    chat: ChatService
    store: ResponseStore = field(default_factory=ResponseStore)

    async def answer(self, asked: ResponsesRequest, *, request: Request) -> Response:
        """The response, or an exception from the error table."""
        owner = tenant(request)
        messages = [*self.store.conversation(asked.previous_response_id, owner=owner), *own_messages(asked)]
        response_id = request.state.answer_id = f"resp_{uuid.uuid4().hex}"
        try:
            chat = built(ChatRequest, chat_body(asked, messages=messages))
            prepared = await self.chat.prepare(chat, answer_id=response_id, tenant=owner)
        except RequestError as error:
            raise _in_our_words(error) from None
        sampling = prepared.jobs[0].request.sampling
        resource = begun(
            asked,
            response_id=response_id,
            created_at=int(time.time()),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
        )
        stored = Stored(owner=owner, body=resource, conversation=messages)
        dialect = ResponsesDialect(resource, form=prepared.form, told=self._told(stored, keep=asked.store is not False))
        answerer = self.chat.answerer
        response = await answerer.answer(prepared.jobs, dialect=dialect, stream=bool(asked.stream), request=request)
        if not asked.stream or asked.store is False:
            return response
        self.store.begin(stored)
        return _Watched(response, dialect)

    def _told(self, stored: Stored, *, keep: bool) -> Told:
        def complete(resource: Item) -> None:
            stored.body = resource
            stored.conversation = [*stored.conversation, *_said(resource)]
            if keep:
                self.store.complete(stored)

        return Told(is_cancelled=stored.cancelled.is_set, clock=time.time, complete=complete)

    def fetch(self, response_id: str, *, request: Request) -> Item:
        """As it is now. Raises UnknownResponse."""
        asked = next((name for name in _QUERIES if name in request.query_params), None)
        if asked is not None:
            raise UnsupportedParameter(f"'{asked}' is not supported by this server. Leave it out.", param=asked)
        return self.store.get(response_id, owner=tenant(request)).body

    def cancel(self, response_id: str, *, request: Request) -> Item:
        """End an answer that is being streamed; it stops with its next token. Raises UnknownResponse, or
        InvalidRequest if there is nothing to end."""
        stored = self.store.get(response_id, owner=tenant(request))
        if not stored.is_running:
            status = stored.body["status"]
            raise InvalidRequest(f"Response '{response_id}' is not being made any more; it is {status}.")
        stored.cancelled.set()
        return {**stored.body, "status": "cancelled"}

    def delete(self, response_id: str, *, request: Request) -> DeletedResponse:
        """Forget it. Raises UnknownResponse."""
        self.store.delete(response_id, owner=tenant(request))
        return DeletedResponse(id=response_id, object="response", deleted=True)


class _Watched(Response):
    """A stream whose response must not stay in progress if the client goes away."""

    def __init__(self, inner: Response, dialect: ResponsesDialect) -> None:
        self._inner, self._dialect = inner, dialect
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._inner(scope, receive, send)
        finally:
            if self._dialect.resource["status"] == "in_progress":
                self._dialect.error_event(Cancelled("the client has gone"))


def _in_our_words(error: RequestError) -> RequestError:
    # The conversation has more messages than the input has items.
    if error.param is not None and error.param.startswith("messages"):
        return type(error)(str(error), param="input")
    return renamed(error, _FIELDS)


def _said(resource: Item) -> list[dict[str, Any]]:
    """The output as messages of the conversation to come."""
    parts = [item for item in resource["output"] if item["type"] == "message"]
    text = "\n".join(part["text"] for item in parts for part in item["content"])
    calls = [item for item in resource["output"] if item["type"] == "function_call"]
    return answered(text, [(call["call_id"], call["name"], call["arguments"]) for call in calls])


def add_routes(router: APIRouter, service: ResponsesService, *, limit_bytes: int) -> None:
    """The addresses under /v1/responses."""

    @router.post(
        "/responses",
        response_model=ResponseResource,
        responses=openapi.streamed(ResponseEvent),
        openapi_extra=openapi.body_of(ResponsesRequest),
    )
    async def responses(request: Request) -> Response:
        """Answer, whole or as a stream of typed events, and keep the answer unless told not to."""
        asked = await bodies.read(request, ResponsesRequest, limit_bytes=limit_bytes)
        return await service.answer(asked, request=request)

    @router.get("/responses/{response_id}", response_model=ResponseResource)
    async def fetch(response_id: str, request: Request) -> Response:
        """A response that is kept."""
        return JSONResponse(service.fetch(response_id, request=request))

    @router.post("/responses/{response_id}/cancel", response_model=ResponseResource)
    async def cancel(response_id: str, request: Request) -> Response:
        """End an answer that is being streamed."""
        return JSONResponse(service.cancel(response_id, request=request))

    @router.delete("/responses/{response_id}")
    async def delete(response_id: str, request: Request) -> DeletedResponse:
        """Forget a response."""
        return service.delete(response_id, request=request)
