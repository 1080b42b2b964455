"""Engines that are compared with ours behind the same API: plain transformers with all weights, and one that says its
tokens at once, so that only the front end is left to measure.

B sequences of a batch, T tokens, V vocabulary.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor
from transformers import DynamicCache

from odmoe_server.engine.sampling import Sampler
from odmoe_server.engine_api import (
    EngineHealth,
    ExpertStats,
    Finished,
    GenerationFailed,
    GenerationRequest,
    Token,
)

log = logging.getLogger(__name__)

_STATE: Final = EngineHealth(
    state="ready",
    detail="ready",
    running=0,
    queued=0,
    predictor_alive=False,
    nodes=(),
    totals=ExpertStats(),
    failovers_total=0,
    prompt_tokens_total=0,
    generation_tokens_total=0,
    protocol_errors_total=0,
)
Event = Token | Finished | GenerationFailed


@dataclass(eq=False)
class _Sequence:
    request: GenerationRequest
    loop: asyncio.AbstractEventLoop
    events: "asyncio.Queue[Event]" = field(default_factory=asyncio.Queue)
    closed: threading.Event = field(default_factory=threading.Event)
    ids: list[int] = field(init=False)
    sampler: Sampler = field(init=False)
    done: bool = False

    def __post_init__(self) -> None:
        self.ids = list(self.request.prompt_ids)
        self.sampler = Sampler(self.request.sampling)

    def put(self, event: Event) -> None:
        if not self.closed.is_set():
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)

    def take(self, logits_V: Tensor) -> None:
        """One more token; the benchmark's requests end by their length only."""
        token = self.sampler.next_token(logits_V, self.ids)
        self.ids.append(token.token_id)
        self.put(token)
        num_tokens = len(self.ids) - len(self.request.prompt_ids)
        if num_tokens >= self.request.max_tokens:
            self.done = True
            self.put(_finished(self.request, num_tokens))


def _finished(request: GenerationRequest, num_tokens: int) -> Finished:
    return Finished(
        reason="length",
        prompt_tokens=len(request.prompt_ids),
        completion_tokens=num_tokens,
        expert_stats=ExpertStats(),
    )


class ResidentEngine:
    """Plain transformers in this process. Whoever waits when a batch is over makes the next one, of `max_batch` at
    most; its prompts are padded on the left, and it runs until its last answer is complete."""

    def __init__(self, model: Any, *, context_length: int, max_batch: int) -> None:
        self.context_length = context_length
        self._model = model
        self._max_batch = max_batch
        self._waiting: queue.SimpleQueue[_Sequence | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="resident", daemon=True)

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def stop(self) -> None:
        """End after the batch that runs."""
        self._waiting.put(None)

    def health(self) -> EngineHealth:
        """See Engine."""
        return _STATE

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Token | Finished, None]:
        """See Engine."""
        sequence = _Sequence(request, asyncio.get_running_loop())
        self._waiting.put(sequence)
        try:
            while True:
                event = await sequence.events.get()
                if isinstance(event, GenerationFailed):
                    raise event
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            sequence.closed.set()

    def _run(self) -> None:
        while (first := self._waiting.get()) is not None:
            batch = [first]
            while len(batch) < self._max_batch and not self._waiting.empty():
                more = self._waiting.get()
                if more is None:
                    return
                batch.append(more)
            try:
                self._answer(batch)
            except Exception:  # outermost loop: the next batch may be better
                log.exception("a batch failed")
                for sequence in batch:
                    sequence.put(GenerationFailed("transformers failed"))

    @torch.inference_mode()
    def _answer(self, batch: Sequence[_Sequence]) -> None:
        length = max(len(sequence.ids) for sequence in batch)
        pads = [length - len(sequence.ids) for sequence in batch]
        ids_BT = torch.tensor([[0] * pad + sequence.ids for pad, sequence in zip(pads, batch, strict=True)])
        mask_BT = torch.tensor([[0] * pad + [1] * (length - pad) for pad in pads])
        cache = DynamicCache(config=self._model.config)
        while True:
            positions_BT = (mask_BT.cumsum(dim=-1) - 1).clamp(min=0)[:, -ids_BT.shape[1] :]
            output = self._model(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                position_ids=positions_BT,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            for sequence, logits_V in zip(batch, output.logits[:, -1], strict=True):
                if not sequence.done:
                    sequence.take(logits_V)
            if all(sequence.done or sequence.closed.is_set() for sequence in batch):
                return
            ids_BT = torch.tensor([[sequence.ids[-1]] for sequence in batch])
            mask_BT = torch.cat([mask_BT, torch.ones((len(batch), 1), dtype=mask_BT.dtype)], dim=1)


class InstantEngine:
    """Says the same tokens over and over, `paced` one a turn of the event loop, else as fast as they are taken."""

    def __init__(self, token_ids: Sequence[int], *, context_length: int, paced: bool) -> None:
        self.context_length = context_length
        self._token_ids = token_ids
        self._paced = paced

    def start(self) -> None:
        """Nothing to do."""

    def stop(self) -> None:
        """Nothing to do."""

    def health(self) -> EngineHealth:
        """See Engine."""
        return _STATE

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Token | Finished, None]:
        """See Engine."""
        for number in range(request.max_tokens):
            if self._paced:
                await asyncio.sleep(0)
            yield Token(self._token_ids[number % len(self._token_ids)])
        yield _finished(request, request.max_tokens)
