"""The decode loop: takes requests in order, steps, samples, publishes. One thread owns the model and all sequences.

Knows no HTTP, no text and no socket. One sequence runs at a time; the others wait in a bounded queue.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace
from typing import Literal

from transformers import DynamicCache

from odmoe_server.cluster.calls import CallError
from odmoe_server.cluster.driver import ClusterDriver
from odmoe_server.engine.sampling import Sampler
from odmoe_server.engine.sequence import Outbox, Sequence
from odmoe_server.engine.step import Stepper
from odmoe_server.engine_api import (
    EngineError,
    EngineHealth,
    Finished,
    GenerationFailed,
    GenerationRequest,
    NotReady,
    QueueFull,
    Token,
)
from odmoe_server.moe.remote import Tally

log = logging.getLogger(__name__)

# How long an idle loop sleeps at most before it looks whether it should stop.
IDLE_S = 1.0


@dataclass(frozen=True, kw_only=True)
class EngineLimits:
    """What the loop accepts."""

    context_length: int
    end_ids: frozenset[int]
    max_queued: int = 64


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What loading the model brings to the loop."""

    stepper: Stepper
    new_cache: Callable[[], DynamicCache]
    total: Tally
    # Most tokens of a prompt that go through the model at once; None for a model that needs them all at once.
    prefill_chunk: int | None = None


class DecodeLoop:
    """The engine (see `engine_api.Engine`). `load` runs first thing on the loop's own thread."""

    def __init__(self, *, cluster: ClusterDriver, limits: EngineLimits, load: Callable[[], Loaded]) -> None:
        self._cluster = cluster
        self._limits = limits
        self._load = load
        self._loaded: Loaded | None = None
        self._state: Literal["loading", "ready", "stopping", "dead"] = "loading"
        self._detail = "loading the weights"
        self._queue: deque[Sequence] = deque()
        self._changed = threading.Condition()
        self._running: Sequence | None = None
        self._last_sequence_id = 0
        self._prompt_tokens_total = 0
        self._generation_tokens_total = 0
        self._failures_total = 0
        self._thread = threading.Thread(target=self._run, name="decode-loop", daemon=True)

    # ------------------------------------------------------------------------------------- from the event loop

    @property
    def context_length(self) -> int:
        """Most tokens prompt and answer may have together."""
        return self._limits.context_length

    def start(self) -> None:
        """Begin to load; `health` tells when it is done."""
        self._thread.start()

    def stop(self, *, timeout_s: float = 10.0) -> None:
        """End after the step in hand; whoever still waits gets `NotReady`."""
        with self._changed:
            self._state, self._detail = "stopping", "the server is shutting down"
            self._changed.notify_all()
        self._thread.join(timeout_s)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Token | Finished, None]:
        """See `engine_api.Engine.generate`."""
        outbox = Outbox(loop=asyncio.get_running_loop())
        self._enqueue(request, outbox)
        try:
            while True:
                event = await outbox.queue.get()
                if isinstance(event, EngineError):
                    raise event
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            outbox.closed.set()

    def health(self) -> EngineHealth:
        """See `engine_api.Engine.health`."""
        cluster = self._cluster.snapshot
        total = self._loaded.total if self._loaded else Tally()
        waiting = self._state == "ready" and cluster.num_nodes_alive == 0
        return EngineHealth(
            state="waiting" if waiting else self._state,
            detail="waiting for a node agent to join" if waiting else self._detail,
            running=int(self._running is not None),
            queued=len(self._queue),
            predictor_alive=cluster.predictor_incarnation is not None,
            nodes=cluster.peers,
            totals=replace(total.stats(), predicted_late=cluster.predicted_late_total),
            failovers_total=cluster.failovers_total,
            prompt_tokens_total=self._prompt_tokens_total,
            generation_tokens_total=self._generation_tokens_total,
            protocol_errors_total=cluster.protocol_errors_total,
            failures_total=self._failures_total,
        )

    def _enqueue(self, request: GenerationRequest, outbox: Outbox) -> None:
        health = self.health()
        if health.state != "ready" or self._loaded is None:
            raise NotReady(health.detail)
        with self._changed:
            if self._state != "ready":
                raise NotReady(self._detail)
            if len(self._queue) >= self._limits.max_queued:
                raise QueueFull(f"{len(self._queue)} requests are waiting already", retry_after_s=2.0)
            self._last_sequence_id += 1
            end_ids = frozenset() if request.sampling.ignore_eos else self._limits.end_ids
            sequence = Sequence(
                sequence_id=self._last_sequence_id,
                request=request,
                outbox=outbox,
                end_ids=end_ids | request.sampling.stop_token_ids,
                cache=self._loaded.new_cache(),
                sampler=Sampler(request.sampling),
                prefill_chunk=self._loaded.prefill_chunk,
            )
            self._queue.append(sequence)
            self._changed.notify_all()

    # --------------------------------------------------------------------------------------- the loop's thread

    def _run(self) -> None:
        try:
            started_s = time.monotonic()
            self._loaded = self._load()
            log.info("weights loaded in %.1f s", time.monotonic() - started_s)
        except Exception:  # outermost: whatever it is, the probes must tell
            log.exception("the model could not be loaded")
            self._enter("dead", "the model could not be loaded; see the server's log")
        else:
            self._enter("ready", "ready")
        while self._state == "ready":
            try:
                self._serve_next()
            except Exception:  # outermost loop: one request's failure is not the next one's
                self._failures_total += 1
                log.exception("a request failed for an unforeseen reason")
        self._refuse_waiting()

    def _enter(self, state: Literal["ready", "dead"], detail: str) -> None:
        """Leave `loading`, unless the server is stopping already."""
        with self._changed:
            if self._state == "loading":
                self._state, self._detail = state, detail

    def _serve_next(self) -> None:
        with self._changed:
            if not self._queue:
                self._changed.wait(IDLE_S)
            if not self._queue or self._state != "ready":
                return
            self._running = sequence = self._queue.popleft()
        try:
            self._serve(sequence)
        except BaseException:
            sequence.outbox.put(GenerationFailed("the server failed to compute the answer"))
            raise
        finally:
            self._running = None
            self._cluster.end_sequence(sequence.sequence_id)

    def _serve(self, sequence: Sequence) -> None:
        """Run one sequence to its end."""
        assert self._loaded is not None
        try:
            while not sequence.cancelled:
                if self._state != "ready":
                    sequence.outbox.put(NotReady(self._detail))
                    return
                num_prompt = len(sequence.fresh_ids) if sequence.is_prompt else 0
                logits_V = self._loaded.stepper.step([sequence])[0]
                self._prompt_tokens_total += num_prompt
                if sequence.is_prompt:  # what the chunk ends with is known already
                    continue
                self._generation_tokens_total += 1
                reason = sequence.accept(sequence.sampler.next_token(logits_V))
                if reason is not None:
                    sequence.finish(reason)
                    return
        except CallError as error:
            log.warning("request %s failed: %s", sequence.request.request_id, error)
            sequence.outbox.put(GenerationFailed("the cluster could not compute the answer; try again"))

    def _refuse_waiting(self) -> None:
        with self._changed:
            waiting, self._queue = list(self._queue), deque()
        for sequence in waiting:
            sequence.outbox.put(NotReady(self._detail))
