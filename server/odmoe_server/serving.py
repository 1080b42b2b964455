"""`odmoe server`: puts store, engine, text and HTTP together and runs them until a signal comes.

The one place which knows all of them. Loading the weights takes a while; the port answers before that, with 503.
"""

import logging
import os
import signal
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import anyio.to_thread
import uvicorn
import zmq
from fastapi import FastAPI
from starlette.types import ASGIApp

from odmoe_model.skeleton import load_generation_config, load_tokenizer
from odmoe_model.store import ExpertStore
from odmoe_server import hosts, listening, models
from odmoe_server.app import create_app
from odmoe_server.catalog import Catalog
from odmoe_server.config import AlignPeriod, ServerSettings, ServingSettings
from odmoe_server.draining import Drain, DrainingServer
from odmoe_server.engine.align import Periods
from odmoe_server.engine.build import EngineOptions, build_engine
from odmoe_server.engine_api import Engine, Sampling
from odmoe_server.importance.options import ImportanceOptions
from odmoe_server.limits import ServiceLimits
from odmoe_server.slow_clients import HastyProtocol
from odmoe_server.text import TextCodec
from odmoe_server.tracing.option import open_tracing
from odmoe_wire import logs
from odmoe_wire.keys import CurveKeys
from odmoe_wire.lifeline import end_with_parent

log = logging.getLogger(__name__)

OWN_KEY = "server"
MAX_HEADER_BYTES = 64 * 1024
MEGABYTE = 1 << 20
IDLE_CONNECTION_S = 30
BACKLOG = 512


class StartedEngine(Engine, Protocol):
    """An engine with a life of its own."""

    def start(self) -> None:
        """Begin to load; returns at once."""
        ...

    def stop(self) -> None:
        """End; may take some seconds."""
        ...


def run(settings: ServerSettings, *, store_path: Path) -> None:
    """Serve the store at `store_path` until SIGINT or SIGTERM. Raises ValueError with a message for the user."""
    if settings.exit_with_parent:
        end_with_parent(signal.SIGKILL)
    logs.configure(settings.log_level, settings.log_format, role="server")
    fd = settings.listen_fd
    listener = listening.inherited(fd) if fd is not None else listening.bind(settings.host, settings.port)
    store = ExpertStore.open(store_path, verify=False)
    tracing = open_tracing(settings.otlp_endpoint, environ=os.environ)
    engine = build_engine(store, replace(engine_options(settings), spans=tracing), context=zmq.Context())
    drains: list[Drain] = []
    app = build_app(
        settings,
        store=store,
        engine=engine,
        lifespan=lifespan_of(engine),
        is_leaving=lambda: any(drain.has_begun for drain in drains),
    )
    log.info("listening on %s", listening.url(listener))
    # uvicorn catches these while it runs and raises them again when it is done: by then they have done their work.
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, lambda *_: None)
    drain = Drain(app if tracing is None else tracing.around(app), drain_s=settings.drain_s)
    drains.append(drain)
    DrainingServer(uvicorn_config(drain, settings), drain=drain).run(sockets=[listener])


def build_app(
    settings: ServingSettings,
    *,
    store: ExpertStore,
    engine: Engine,
    lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]] | None,
    is_leaving: Callable[[], bool] = lambda: False,
) -> FastAPI:
    """The HTTP application for a store and its engine."""
    catalog = Catalog(
        names=settings.served_model_names or (models.own_name(settings.model),),
        created=int(time.time()),
        context_length=engine.context_length,
        fingerprint=f"odmoe_{store.manifest.digest[:12]}",
        sampling=default_sampling(store, settings),
    )
    keys = api_keys(settings)
    return create_app(
        engine=engine,
        text=TextCodec(
            load_tokenizer(store), num_embeddings=store.manifest.config.get("vocab_size"), end_ids=end_ids(store)
        ),
        catalog=catalog,
        api_keys=keys,
        allowed_hosts=hosts.names_allowed(settings.allowed_hosts, host=settings.host, has_keys=bool(keys)),
        keep_alive_s=settings.keep_alive_s,
        limits=service_limits(settings),
        metrics_prefix=settings.metrics_prefix,
        is_leaving=is_leaving,
        lifespan=lifespan,
    )


def end_ids(store: ExpertStore) -> Sequence[int] | None:
    """The tokens that end an answer, where the checkpoint names them."""
    ids: int | list[int] | None = load_generation_config(store).eos_token_id
    return [ids] if isinstance(ids, int) else ids


def service_limits(settings: ServingSettings) -> ServiceLimits:
    """What one client may ask for."""
    return ServiceLimits(
        max_body_bytes=settings.max_body_mb * MEGABYTE,
        max_messages=settings.max_messages,
        max_choices=settings.max_choices,
        max_stops=settings.max_stops,
        max_schema_bytes=settings.max_schema_kb * 2**10,
        max_queued=settings.max_queued,
        max_wait_s=settings.max_wait_s,
        max_answer_s=settings.max_answer_s,
        substitutes=settings.mode == "importance" and settings.max_alpha != 0,
    )


def default_sampling(store: ExpertStore, settings: ServingSettings) -> Sampling:
    """For requests that say nothing: the operator's word, else the checkpoint's, else OpenAI's."""
    own = load_generation_config(store)
    temperature = own.temperature if settings.default_temperature is None else settings.default_temperature
    top_p = own.top_p if settings.default_top_p is None else settings.default_top_p
    return Sampling(
        temperature=1.0 if temperature is None else float(temperature),
        top_p=1.0 if top_p is None else float(top_p),
        top_k=int(own.top_k or 0),
        min_p=float(own.min_p or 0.0),
        repetition_penalty=float(own.repetition_penalty or 1.0),
    )


def api_keys(settings: ServingSettings) -> Sequence[str]:
    """All keys that let a client in; none means that everyone may come."""
    keys = [] if settings.api_key is None else [settings.api_key.get_secret_value()]
    if settings.api_key_file is not None:
        try:
            lines = settings.api_key_file.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise ValueError(f"--api-key-file {settings.api_key_file} cannot be read: {error}") from None
        from_file = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not from_file:
            # Nobody asks for a key file to let everyone in.
            raise ValueError(f"--api-key-file {settings.api_key_file} has no key in it")
        keys += from_file
    return keys


def engine_options(settings: ServerSettings) -> EngineOptions:
    """The engine's share of the settings."""
    keys_dir = settings.keys_dir
    return EngineOptions(
        endpoint=settings.endpoint,
        device=settings.device,
        threads=settings.threads,
        group_size=settings.group_size,
        max_queued=settings.max_queued,
        max_context=settings.max_context,
        heartbeat_s=settings.heartbeat_s,
        lost_after_s=settings.lost_after_s,
        call_timeout_s=settings.call_timeout_s,
        periods=Periods(token=_period(settings.align_token), kv=_period(settings.align_kv), prompt=settings.prompt_kv),
        keys=None if keys_dir is None else CurveKeys.load(keys_dir, name=OWN_KEY),
        timeline=settings.timeline,
        trace=settings.trace,
        prefill_chunk=settings.prefill_chunk,
        slot_mode=settings.slot_mode,
        importance=importance_options(settings),
        draft=settings.draft,
        max_running=settings.max_running,
        kv_memory_bytes=None if settings.kv_memory_mb is None else settings.kv_memory_mb * MEGABYTE,
        prefix_cache=settings.prefix_cache,
    )


def importance_options(settings: ServingSettings) -> ImportanceOptions | None:
    """What importance mode was told, its own defaults for the rest; None in another mode."""
    if settings.mode != "importance":
        return None
    told: dict[str, Any] = {
        "alpha": settings.alpha,
        "max_alpha": settings.max_alpha,
        "max_weight": settings.max_substituted_weight,
        "eviction": settings.eviction,
        "window": settings.eviction_window,
        "prefetch": settings.prefetch,
        "cpu_share": settings.cpu_share,
    }
    return replace(ImportanceOptions(), **{name: value for name, value in told.items() if value is not None})


def _period(text: AlignPeriod) -> int | None:
    return None if text == "off" else int(text)


def uvicorn_config(app: ASGIApp, settings: ServingSettings) -> uvicorn.Config:
    """Everything about the HTTP server that must not be left to its defaults."""
    return uvicorn.Config(
        app,
        http=HastyProtocol,
        ws="none",
        lifespan="on",
        backlog=BACKLOG,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_keep_alive=IDLE_CONNECTION_S,
        timeout_graceful_shutdown=settings.drain_s,
        log_config=None,
        access_log=False,  # `guard` writes one, with request ids
        server_header=False,
        proxy_headers=False,
    )


def lifespan_of(engine: StartedEngine) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """Starts the engine with the application, and ends it with it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
        engine.start()
        try:
            yield
        finally:
            await anyio.to_thread.run_sync(engine.stop)

    return lifespan
