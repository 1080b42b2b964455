"""The HTTP application: routes, and which service answers which. Knows no global state: all it needs comes in."""

import asyncio
from collections.abc import Sequence
from typing import Any

import anyio.to_thread
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Lifespan

from odmoe_server import probes
from odmoe_server.catalog import Catalog
from odmoe_server.engine_api import Engine, EngineError
from odmoe_server.guard import Guard
from odmoe_server.metrics import Metrics
from odmoe_server.openai.chat import ChatService
from odmoe_server.openai.errors import (
    BodyTooLarge,
    BodyTooSlow,
    InvalidRequest,
    MalformedBody,
    RequestError,
    from_framework,
    problem_of,
)
from odmoe_server.openai.schemas import ChatCompletion, ChatRequest, ErrorBody, Model, ModelList, parse_chat
from odmoe_server.sse import CLIENT_GONE_STATUS
from odmoe_server.text import TextCodec

# Parsing this much takes about a millisecond; more is parsed in a thread.
_PARSE_INLINE_BYTES = 256 * 1024
_BODY_TIMEOUT_S = 60.0
_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request cannot be served as it is."},
    "5XX": {"model": ErrorBody, "description": "The server cannot serve it now."},
}


def create_app(
    *,
    engine: Engine,
    text: TextCodec,
    catalog: Catalog,
    api_keys: Sequence[str] = (),
    keep_alive_s: float = 5.0,
    max_body_bytes: int = 8 * 2**20,
    metrics_prefix: str = "odmoe",
    lifespan: Lifespan[FastAPI] | None = None,
) -> FastAPI:
    """The application for one model. Its engine is started and stopped by `lifespan`, if by anyone."""
    metrics = Metrics(engine, model_name=catalog.names[0], prefix=metrics_prefix)
    chat = ChatService(engine=engine, text=text, catalog=catalog, metrics=metrics, keep_alive_s=keep_alive_s)
    app = FastAPI(
        title="odmoe",
        version=probes.version_body()["version"],
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,  # they would load scripts from elsewhere
        redoc_url=None,
        responses=_ERRORS,
    )
    app.add_middleware(Guard, keys=api_keys, metrics=metrics)
    _add_error_handlers(app)
    _add_model_routes(app, chat=chat, catalog=catalog, max_body_bytes=max_body_bytes)
    _add_probe_routes(app, engine=engine, metrics=metrics)
    return app


def _add_model_routes(app: FastAPI, *, chat: ChatService, catalog: Catalog, max_body_bytes: int) -> None:
    @app.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        openapi_extra={"requestBody": _body_of(ChatRequest)},
    )
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation, whole or as a stream of events."""
        body = await read_json(request, limit_bytes=max_body_bytes)
        inline = len(body) <= _PARSE_INLINE_BYTES
        parsed = parse_chat(body) if inline else await anyio.to_thread.run_sync(parse_chat, body)
        return await chat.answer(parsed, request=request)

    @app.get("/v1/models")
    async def models() -> ModelList:
        """The names the model is served under."""
        return catalog.models()

    # Names like org/model have a slash in them.
    @app.get("/v1/models/{model_id:path}")
    async def model(model_id: str) -> Model:
        """One of them."""
        return catalog.model(model_id)


def _add_probe_routes(app: FastAPI, *, engine: Engine, metrics: Metrics) -> None:
    @app.get("/health")
    async def health() -> Response:
        """200 when a request would be answered now, else 503."""
        return probes.health(engine)

    @app.get("/metrics")
    async def metrics_page() -> Response:
        """Prometheus text."""
        return probes.metrics_page(metrics)

    @app.get("/version")
    async def version() -> dict[str, str]:
        """The server's version."""
        return probes.version_body()


def _add_error_handlers(app: FastAPI) -> None:
    async def ours(request: Request, error: Exception) -> Response:
        problem = problem_of(error)
        return JSONResponse(problem.body, status_code=problem.status, headers=problem.headers)

    async def of_the_router(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        response = await ours(request, from_framework(error, method=request.method, path=request.scope["path"]))
        response.headers.update(error.headers or {})  # Allow
        return response

    async def of_a_parameter(request: Request, error: Exception) -> Response:
        return await ours(request, InvalidRequest("The address has a part this server does not understand."))

    async def client_gone(request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_GONE_STATUS)

    app.add_exception_handler(RequestError, ours)
    app.add_exception_handler(EngineError, ours)
    app.add_exception_handler(HTTPException, of_the_router)
    app.add_exception_handler(RequestValidationError, of_a_parameter)
    app.add_exception_handler(ClientDisconnect, client_gone)


async def read_json(request: Request, *, limit_bytes: int) -> bytes:
    """The body of a request that says it is JSON. Raises `MalformedBody` or `BodyTooLarge`, the latter before all of
    it has been read."""
    _check_headers(request.headers, limit_bytes=limit_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_TIMEOUT_S):
            async for piece in request.stream():
                body += piece
                if len(body) > limit_bytes:
                    raise BodyTooLarge(_too_large(limit_bytes))
    except TimeoutError:
        raise BodyTooSlow(f"The request body was not here after {_BODY_TIMEOUT_S:.0f} seconds.") from None
    return bytes(body)


def _check_headers(headers: Headers, *, limit_bytes: int) -> None:
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise MalformedBody(f"The content type must be application/json, not '{kind}'.")
    length = headers.get("content-length", "0")
    if length.isdecimal() and int(length) > limit_bytes:
        raise BodyTooLarge(_too_large(limit_bytes))


def _too_large(limit_bytes: int) -> str:
    return f"The request body is larger than this server takes ({limit_bytes} bytes)."


def _body_of(model: type[ChatRequest]) -> dict[str, Any]:
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    return {"required": True, "content": {"application/json": {"schema": schema}}}
