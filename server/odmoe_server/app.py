"""The HTTP application: routes, and which service answers which. Knows no global state: all it needs comes in."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Lifespan

from odmoe_server import bodies, hosts, openapi, probes
from odmoe_server.answering import Answerer
from odmoe_server.anthropic import messages
from odmoe_server.anthropic.answers import MessageEvent
from odmoe_server.anthropic.errors import error_body
from odmoe_server.anthropic.messages import MessagesService
from odmoe_server.anthropic.schemas import CountRequest, MessagesRequest
from odmoe_server.catalog import Catalog
from odmoe_server.engine_api import Engine, EngineError
from odmoe_server.guard import Guard
from odmoe_server.limits import ServiceLimits
from odmoe_server.metrics import Metrics
from odmoe_server.openai import responses
from odmoe_server.openai.answers import (
    ChatChunk,
    ChatCompletion,
    Detokenized,
    ErrorBody,
    Model,
    ModelList,
    TextCompletion,
    Tokens,
)
from odmoe_server.openai.chat import ChatService
from odmoe_server.openai.completions import CompletionService
from odmoe_server.openai.errors import InvalidRequest, RequestError, from_framework, problem_of
from odmoe_server.openai.responses import ResponsesService
from odmoe_server.openai.responses_answers import ResponseEvent
from odmoe_server.openai.responses_schemas import ResponsesRequest
from odmoe_server.openai.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from odmoe_server.openai.tokens import TokenService
from odmoe_server.openai.tools_kit import ToolKit
from odmoe_server.pump import NotBegun, NotEnded
from odmoe_server.sse import CLIENT_GONE_STATUS
from odmoe_server.status.routes import Watchers, add_routes
from odmoe_server.text import TextCodec

_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request cannot be served as it is."},
    "5XX": {"model": ErrorBody, "description": "The server cannot serve it now."},
}
# llama.cpp serves the same without /v1.
_BASES = ("/v1", "")


def create_app(
    *,
    engine: Engine,
    text: TextCodec,
    catalog: Catalog,
    api_keys: Sequence[str] = (),
    allowed_hosts: Sequence[str] = hosts.ANY,
    keep_alive_s: float = 5.0,
    limits: ServiceLimits | None = None,
    metrics_prefix: str = "odmoe",
    is_leaving: Callable[[], bool] = lambda: False,
    lifespan: Lifespan[FastAPI] | None = None,
) -> FastAPI:
    """The application for one model. Its engine is started and stopped by `lifespan`, if by anyone. Once `is_leaving`,
    streams that have no end of their own end."""
    limits = limits or ServiceLimits()
    metrics = Metrics(engine, model_name=catalog.names[0], prefix=metrics_prefix)
    answerer = Answerer(engine=engine, text=text, metrics=metrics, keep_alive_s=keep_alive_s, limits=limits)
    kit = ToolKit(text, max_schema_bytes=limits.max_schema_bytes)
    app = FastAPI(
        title="odmoe",
        version=probes.version_body()["version"],
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,  # they would load scripts from elsewhere
        redoc_url=None,
        responses=_ERRORS,
    )
    app.add_middleware(Guard, keys=api_keys, hosts=allowed_hosts, metrics=metrics)
    _add_error_handlers(app)
    chat = ChatService(answerer=answerer, catalog=catalog, kit=kit)
    stored = ResponsesService(chat=chat)
    for base in _BASES:
        router = APIRouter(prefix=base, include_in_schema=base == _BASES[0])
        _add_chat(router, chat, limit_bytes=limits.max_body_bytes)
        responses.add_routes(router, stored, limit_bytes=limits.max_body_bytes)
        _add_completions(router, CompletionService(answerer=answerer, catalog=catalog, kit=kit), limits.max_body_bytes)
        _add_models(router, catalog)
        app.include_router(router)
    messages.add_routes(app.router, MessagesService(chat=chat), limit_bytes=limits.max_body_bytes)
    _add_token_routes(app, TokenService(text=text, catalog=catalog, kit=kit), limit_bytes=limits.max_body_bytes)
    _add_health_routes(app, engine)
    _add_probe_routes(app, engine=engine, metrics=metrics, catalog=catalog)
    add_routes(app, watchers=Watchers(engine, version=app.version, model=catalog.names[0], is_leaving=is_leaving))
    openapi.describe(
        app,
        ChatRequest,
        ChatChunk,
        CompletionRequest,
        TokenizeRequest,
        DetokenizeRequest,
        MessagesRequest,
        MessageEvent,
        CountRequest,
        ResponsesRequest,
        ResponseEvent,
        secured=bool(api_keys),
    )
    return app


def _add_chat(router: APIRouter, chat: ChatService, *, limit_bytes: int) -> None:
    @router.post(
        "/chat/completions",
        response_model=ChatCompletion,
        responses=openapi.streamed(ChatChunk),
        openapi_extra=openapi.body_of(ChatRequest),
    )
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation, whole or as a stream of events."""
        asked = await bodies.read(request, ChatRequest, limit_bytes=limit_bytes)
        return await chat.answer(asked, request=request)


def _add_completions(router: APIRouter, texts: CompletionService, limit_bytes: int) -> None:
    @router.post(
        "/completions",
        response_model=TextCompletion,
        responses=openapi.streamed(TextCompletion),
        openapi_extra=openapi.body_of(CompletionRequest),
    )
    async def completions(request: Request) -> Response:
        """Go on from one prompt or several, whole or as a stream of events."""
        asked = await bodies.read(request, CompletionRequest, limit_bytes=limit_bytes)
        return await texts.answer(asked, request=request)


def _add_models(router: APIRouter, catalog: Catalog) -> None:
    @router.get("/models")
    async def models() -> ModelList:
        """The names the model is served under."""
        return catalog.models()

    # Names like org/model have a slash in them.
    @router.get("/models/{model_id:path}")
    async def model(model_id: str) -> Model:
        """One of them."""
        return catalog.model(model_id)


def _add_token_routes(app: FastAPI, tokens: TokenService, *, limit_bytes: int) -> None:
    @app.post("/tokenize", response_model_exclude_unset=True, openapi_extra=openapi.body_of(TokenizeRequest))
    async def tokenize(request: Request) -> Tokens:
        """The tokens of a text or a conversation."""
        return await tokens.tokenize(await bodies.read(request, TokenizeRequest, limit_bytes=limit_bytes))

    @app.post("/detokenize", openapi_extra=openapi.body_of(DetokenizeRequest))
    async def detokenize(request: Request) -> Detokenized:
        """The text of tokens."""
        return await tokens.detokenize(await bodies.read(request, DetokenizeRequest, limit_bytes=limit_bytes))


def _add_health_routes(app: FastAPI, engine: Engine) -> None:
    @app.get("/health")
    async def health() -> Response:
        """200 when a request would be answered now, else 503."""
        return probes.health(engine)

    @app.get("/health/ready")
    async def ready() -> Response:
        """The same."""
        return probes.health(engine)

    @app.get("/health/live")
    async def live() -> Response:
        """200 unless the engine is dead."""
        return probes.live(engine)


def _add_probe_routes(app: FastAPI, *, engine: Engine, metrics: Metrics, catalog: Catalog) -> None:
    @app.get("/metrics")
    async def metrics_page() -> Response:
        """Prometheus text."""
        return probes.metrics_page(metrics)

    @app.get("/version")
    async def version() -> dict[str, str]:
        """The server's version."""
        return probes.version_body()

    @app.get("/ping")
    async def ping() -> dict[str, str]:
        """An answer, whatever the engine does."""
        return probes.version_body()

    @app.get("/load")
    async def load() -> dict[str, int]:
        """How many requests are in hand."""
        return probes.load(engine)

    @app.get("/v1/stats")
    async def stats() -> dict[str, Any]:
        """What the engine has counted, and each node."""
        return probes.stats(engine)

    @app.get("/cluster")
    async def cluster() -> dict[str, Any]:
        """Who serves, and what."""
        return probes.cluster(engine, catalog)


def _add_error_handlers(app: FastAPI) -> None:
    async def ours(request: Request, error: Exception) -> Response:
        problem = problem_of(error)
        body = error_body(problem, path=request.scope["path"], request_id=request.state.request_id)
        return JSONResponse(body, status_code=problem.status, headers=problem.headers)

    async def of_the_router(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        response = await ours(request, from_framework(error, method=request.method, path=request.scope["path"]))
        response.headers.update(error.headers or {})  # Allow
        return response

    async def of_a_parameter(request: Request, error: Exception) -> Response:
        return await ours(request, InvalidRequest("The address has a part this server does not understand."))

    async def client_gone(request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_GONE_STATUS)

    handlers: dict[type[Exception], Callable[[Request, Exception], Awaitable[Response]]] = {
        RequestError: ours,
        EngineError: ours,
        NotBegun: ours,
        NotEnded: ours,
        HTTPException: of_the_router,
        RequestValidationError: of_a_parameter,
        ClientDisconnect: client_gone,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
