"""The decode loop: admits requests in order, steps all that run together, publishes. One thread owns the model and all
sequences. Knows no HTTP, no text and no socket.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from transformers import DynamicCache

from odmoe_server.cluster.calls import CallError
from odmoe_server.cluster.driver import ClusterDriver
from odmoe_server.engine.kv import KvSize, Room
from odmoe_server.engine.prefix import PrefixCache
from odmoe_server.engine.rota import Patience, Rota
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
    ReadPrompt,
    Token,
    TooLarge,
)
from odmoe_server.moe.tally import Tally

log = logging.getLogger(__name__)

# How long an idle loop sleeps at most before it looks whether it should stop.
IDLE_S = 1.0
# An idle loop waits so long for others who ask at the same time, and as long again while any come: prompts that begin
# together share the experts that are loaded and the products they are multiplied in.
COMPANY_S = 0.005
MOST_COMPANY_S = 0.05
# Of the memory for keys and values, what prompt heads that may come again may take.
PREFIX_SHARE = 0.25


@dataclass(frozen=True, kw_only=True)
class EngineLimits:
    """What the loop accepts. `max_running`: sequences that are decoded together."""

    context_length: int
    end_ids: frozenset[int]
    max_queued: int = 64
    max_running: int = 16


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What loading the model brings to the loop. `prefill_chunk`: most tokens of a prompt that go through the model at
    once; None for a model that needs them all at once. `draft`: most guesses of the shadow verified in a step.
    `alpha_of`: how far a request's experts may be replaced."""

    stepper: Stepper
    new_cache: Callable[[], DynamicCache]
    total: Tally
    kv_size: KvSize
    kv_budget_bytes: int
    prefill_chunk: int | None = None
    draft: int = 0
    prefix_cache: bool = True
    alpha_of: Callable[[GenerationRequest], float] = lambda request: 0.0


@dataclass(frozen=True, kw_only=True)
class _Going:
    """A step with prompts that is under way: what goes on with it, layer by layer."""

    batch: list[Sequence]
    layers: Generator[None, None, list[list[torch.Tensor]]]


class DecodeLoop:
    """The engine (see `engine_api.Engine`). `load` runs first thing on the loop's own thread."""

    def __init__(self, *, cluster: ClusterDriver, limits: EngineLimits, load: Callable[[], Loaded]) -> None:
        self._cluster = cluster
        self._limits = limits
        self._load = load
        self._loaded: Loaded | None = None
        self._room = Room(budget_bytes=0, max_running=limits.max_running)
        self._prefix: PrefixCache | None = None
        self._rota = Rota(chunk=None)
        self._patience = Patience()
        # The step with prompts that was left for answers to come in between.
        self._going: _Going | None = None
        self._state: Literal["loading", "ready", "stopping", "dead"] = "loading"
        self._detail = "loading the weights"
        self._context_length = limits.context_length
        self._queue: deque[Sequence] = deque()
        self._changed = threading.Condition()
        self._running: list[Sequence] = []
        # Those the loop's thread is at work on: if it fails, they did.
        self._in_hand: list[Sequence] = []
        self._last_sequence_id = 0
        self._prompt_tokens_total = 0
        self._generation_tokens_total = 0
        self._failures_total = 0
        self._thread = threading.Thread(target=self._run, name="decode-loop", daemon=True)

    # ------------------------------------------------------------------------------------- from the event loop

    @property
    def context_length(self) -> int:
        """Most tokens prompt and answer may have together."""
        return self._context_length

    def start(self) -> None:
        """Begin to load; `health` tells when it is done."""
        self._thread.start()

    def stop(self, *, timeout_s: float = 10.0) -> None:
        """End after the step in hand; whoever still waits gets `NotReady`."""
        with self._changed:
            self._state, self._detail = "stopping", "the server is shutting down"
            self._changed.notify_all()
        self._thread.join(timeout_s)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[ReadPrompt | Token | Finished, None]:
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
        prefix = self._prefix
        return EngineHealth(
            state="waiting" if waiting else self._state,
            detail="waiting for a node agent to join" if waiting else self._detail,
            running=len(self._running),
            queued=len(self._queue),
            predictor_alive=cluster.predictor_incarnation is not None,
            nodes=cluster.peers,
            totals=replace(total.stats(), predicted_late=cluster.predicted_late_total),
            failovers_total=cluster.failovers_total,
            prompt_tokens_total=self._prompt_tokens_total,
            generation_tokens_total=self._generation_tokens_total,
            protocol_errors_total=cluster.protocol_errors_total,
            failures_total=self._failures_total,
            kv_reserved_bytes=self._room.reserved_bytes,
            kv_prefix_bytes=prefix.used_bytes if prefix is not None else 0,
            kv_budget_bytes=self._room.budget_bytes,
            cluster=cluster.figures,
        )

    def _enqueue(self, request: GenerationRequest, outbox: Outbox) -> None:
        health = self.health()
        if health.state != "ready" or self._loaded is None:
            raise NotReady(health.detail)
        with self._changed:
            if self._state != "ready":
                raise NotReady(self._detail)
            _refuse_what_never_fits(request, self._loaded)
            if len(self._queue) >= self._limits.max_queued and not self._has_room():
                raise QueueFull(f"{len(self._queue)} requests are waiting already", retry_after_s=2.0)
            self._last_sequence_id += 1
            end_ids = request.sampling.stop_token_ids
            end_ids |= frozenset() if request.sampling.ignore_eos else self._limits.end_ids
            sequence = Sequence(
                sequence_id=self._last_sequence_id,
                request=request,
                outbox=outbox,
                end_ids=end_ids,
                cache=self._loaded.new_cache(),
                sampler=Sampler(request.sampling, end_ids=end_ids),
                prefill_chunk=self._loaded.prefill_chunk,
                may_go_back=self._loaded.draft > 0,
                alpha=self._loaded.alpha_of(request),
            )
            self._queue.append(sequence)
            if (timeline := self._cluster.timeline) is not None:
                num_prompt = len(request.prompt_ids)
                timeline.came(sequence.sequence_id, request_id=request.request_id, num_prompt=num_prompt)
            self._changed.notify_all()

    def _has_room(self) -> bool:
        """Whether a request that came now would not wait."""
        return not self._queue and len(self._running) < self._limits.max_running

    # --------------------------------------------------------------------------------------- the loop's thread

    def _run(self) -> None:
        try:
            started_s = time.monotonic()
            self._begin_with(self._load())
            log.info("weights loaded in %.1f s", time.monotonic() - started_s)
        except Exception:  # outermost: whatever it is, the probes must tell
            log.exception("the model could not be loaded")
            self._enter("dead", "the model could not be loaded; see the server's log")
        else:
            self._enter("ready", "ready")
        while self._state == "ready":
            try:
                self._turn()
            except Exception:  # outermost loop: one request's failure is not the next one's
                self._failures_total += 1
                log.exception("requests failed for an unforeseen reason")
                self._fail(self._in_hand, GenerationFailed("the server failed to compute the answer"))
        self._refuse_all()

    def _begin_with(self, loaded: Loaded) -> None:
        self._room.budget_bytes = loaded.kv_budget_bytes
        longest = loaded.kv_size.positions_in(loaded.kv_budget_bytes, most=self._limits.context_length)
        if longest < self._limits.context_length:
            log.warning(
                "keys and values have room for %d positions, not for the model's %d", longest, self._context_length
            )
        self._context_length = longest
        if loaded.prefix_cache and loaded.prefill_chunk is not None:
            self._prefix = PrefixCache(
                budget_bytes=int(loaded.kv_budget_bytes * PREFIX_SHARE), chunk=loaded.prefill_chunk
            )
        self._rota = Rota(chunk=loaded.prefill_chunk, draft=loaded.draft)
        self._loaded = loaded

    def _enter(self, state: Literal["ready", "dead"], detail: str) -> None:
        """Leave `loading`, unless the server is stopping already."""
        with self._changed:
            if self._state == "loading":
                self._state, self._detail = state, detail

    def _turn(self) -> None:
        """Let go of who went away, take in who has room, and take one step with some of those that run."""
        with self._changed:
            if not self._running:
                self._await_company()
            for sequence in [sequence for sequence in self._queue if sequence.cancelled]:
                self._queue.remove(sequence)
                self._tell_left(sequence)
            self._leave([sequence for sequence in self._running if sequence.cancelled])
            if self._going is not None and not self._still(self._going.batch):
                self._give_up_prompts()
            while self._queue:
                self._in_hand = [self._queue[0]]
                if not self._admit(self._queue[0]):
                    break
                self._running.append(self._queue.popleft())
        self._in_hand = batch = self._rota.next_batch(self._running)
        if batch and batch[0].is_prompt:
            self._read(batch)
        elif batch:
            self._step(batch)

    def _await_company(self) -> None:
        """Sleep until somebody asks, and a little longer if others do too. Holds `_changed`."""
        if not self._queue and not self._changed.wait(IDLE_S):
            return
        until_s = time.monotonic() + MOST_COMPANY_S
        while self._state == "ready" and len(self._queue) < self._limits.max_running and time.monotonic() < until_s:
            if not self._changed.wait(COMPANY_S):
                return

    def _admit(self, sequence: Sequence) -> bool:
        """First come, first served: who does not fit waits, and those behind too."""
        assert self._loaded is not None
        request = sequence.request
        need_bytes = _need_bytes(request, self._loaded)
        if self._prefix is not None:
            self._prefix.shrink(self._room.budget_bytes - self._room.reserved_bytes - need_bytes)
        beside_bytes = self._prefix.used_bytes if self._prefix is not None else 0
        if not self._room.admit(sequence.sequence_id, need_bytes, beside_bytes=beside_bytes):
            return False
        found = 0
        if self._prefix is not None and not request.reads_prompt:
            found = self._prefix.find(request.tenant, request.prompt_ids, sequence.cache)
        sequence.begin(cached_tokens=found)
        return True

    def _step(self, batch: list[Sequence]) -> None:
        assert self._loaded is not None
        stepper, began_s = self._loaded.stepper, time.monotonic()
        for sequence in batch:
            stepper.draft(sequence, most=self._rota.num_drafts(len(batch)))
        self._listen_to(batch)
        try:
            rows = stepper.step(batch)
        except CallError as error:
            self._fail_call(batch, error)
            return
        self._patience.answered(time.monotonic() - began_s)
        for sequence, own in zip(batch, rows, strict=True):
            self._take(sequence, own)

    def _read(self, batch: list[Sequence]) -> None:
        """Go on with the step of prompts that is under way, else begin one with these. It goes to its end, unless it
        would hold up answers for too long."""
        assert self._loaded is not None
        going, self._going = self._going, None
        if going is None:
            going = _Going(batch=batch, layers=self._loaded.stepper.step_by_layer(batch))
        self._in_hand = going.batch
        self._listen_to(going.batch)
        began_s, num_layers = time.monotonic(), 0
        try:
            while True:
                next(going.layers)
                num_layers += 1
                if self._is_impatient(time.monotonic() - began_s, num_layers):
                    self._going = going
                    return
        except CallError as error:
            self._fail_call(self._still(going.batch), error)
        except StopIteration as done:
            for sequence, own in zip(going.batch, done.value, strict=True):
                if sequence in self._running:
                    self._take(sequence, own)

    def _is_impatient(self, part_s: float, num_layers: int) -> bool:
        """Whether an answer has been held up long enough."""
        answers = any(not sequence.is_prompt for sequence in self._running)
        return answers and self._patience.is_over(part_s, num_layers=num_layers)

    def _listen_to(self, batch: list[Sequence]) -> None:
        """Let the cluster give up what nobody waits for any more."""
        self._cluster.is_unheard = lambda: self._state != "ready" or all(sequence.cancelled for sequence in batch)

    def _still(self, batch: list[Sequence]) -> list[Sequence]:
        """Those that run on."""
        return [sequence for sequence in batch if sequence in self._running]

    def _give_up_prompts(self) -> None:
        if self._going is not None:
            self._going.layers.close()
            self._going = None

    def _fail_call(self, batch: list[Sequence], error: CallError) -> None:
        names = ", ".join(sequence.request.request_id for sequence in batch)
        log.warning("requests %s failed: %s", names, error)
        self._fail(batch, GenerationFailed("the cluster could not compute the answer; try again"))

    def _take(self, sequence: Sequence, rows: list[torch.Tensor]) -> None:
        """What a step brought one sequence. Its failure is not the others'."""
        assert self._loaded is not None
        before, was_prompt, num_fresh = sequence.completion_tokens, sequence.is_prompt, len(sequence.fresh_ids)
        try:
            self._loaded.stepper.take(sequence, rows)
        except Exception:  # outermost for one request: a processor of its own logits, say
            self._failures_total += 1
            log.exception("request %s failed for an unforeseen reason", sequence.request.request_id)
            self._fail([sequence], GenerationFailed("the server failed to compute the answer"))
            return
        self._generation_tokens_total += sequence.completion_tokens - before
        if was_prompt:
            self._prompt_tokens_total += num_fresh
            if self._prefix is not None:
                self._prefix.keep(sequence.request.tenant, sequence.request.prompt_ids, sequence.cache)
        if sequence.finish_reason is not None:
            self._leave([sequence])  # first: who has heard the end may look whether anything is left
            sequence.deliver_end()

    def _fail(self, sequences: list[Sequence], error: EngineError) -> None:
        self._leave(sequences)
        for sequence in sequences:
            sequence.outbox.put(error)

    def _leave(self, sequences: list[Sequence]) -> None:
        """They are over: give back what they held, here and on every node."""
        for sequence in sequences:
            with self._changed:
                for held in (self._running, self._queue):
                    if sequence in held:
                        held.remove(sequence)
            self._room.leave(sequence.sequence_id)
            self._cluster.end_sequence(sequence.sequence_id)
            self._tell_left(sequence)

    def _tell_left(self, sequence: Sequence) -> None:
        if (timeline := self._cluster.timeline) is not None:
            num_tokens, reason = sequence.completion_tokens, sequence.finish_reason
            timeline.left(sequence.sequence_id, num_tokens=num_tokens, reason=reason)

    def _refuse_all(self) -> None:
        with self._changed:
            waiting, self._queue = list(self._queue), deque()
        for sequence in waiting:
            sequence.outbox.put(NotReady(self._detail))
        self._give_up_prompts()
        self._fail(list(self._running), NotReady(self._detail))


def _need_bytes(request: GenerationRequest, loaded: Loaded) -> int:
    """What a request can come to at most: keys and values, and its prompt's logits where they are told of."""
    num_prompt = len(request.prompt_ids)
    need_bytes = loaded.kv_size.bytes_for(num_prompt + request.max_tokens)
    if request.prompt_logprobs is None:
        return need_bytes
    return need_bytes + loaded.kv_size.bytes_of_reading(num_prompt, chunk=loaded.prefill_chunk)


def _refuse_what_never_fits(request: GenerationRequest, loaded: Loaded) -> None:
    """Raises TooLarge for what would wait for ever, and those behind it too. Keys and values alone always fit, as the
    context is no longer than they may become."""
    if request.prompt_logprobs is None:
        return
    need_bytes = _need_bytes(request, loaded)
    if need_bytes > loaded.kv_budget_bytes:
        raise TooLarge(
            f"With log probabilities of its prompt, this request can take {need_bytes} bytes, more than the"
            f" {loaded.kv_budget_bytes} this server has for keys, values and logits. Leave 'prompt_logprobs' or 'echo'"
            " out, or shorten the prompt or 'max_tokens'."
        )
