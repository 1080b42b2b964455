"""One request on its way through the decode loop. Knows token ids, drafts and limits; knows no model, socket or text.

V vocabulary.
"""

import asyncio
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field, replace

import torch
from transformers import DynamicCache

from odmoe_model.kvcache import trim_cache, truncate_cache
from odmoe_server.engine.align import Shadowed
from odmoe_server.engine.reading import Reader, experts_of
from odmoe_server.engine.sampling import Sampler
from odmoe_server.engine_api import (
    EngineError,
    Finished,
    FinishReason,
    GenerationRequest,
    ReadPrompt,
    Substituted,
    Token,
)
from odmoe_server.moe.lanes import Lane
from odmoe_server.moe.tally import Tally

Event = ReadPrompt | Token | Finished | EngineError


@dataclass(kw_only=True)
class Outbox:
    """Carries events from the decode loop's thread to the event loop that waits for them."""

    loop: asyncio.AbstractEventLoop
    queue: "asyncio.Queue[Event]" = field(default_factory=asyncio.Queue)
    closed: threading.Event = field(default_factory=threading.Event)

    def put(self, event: Event) -> None:
        """From any thread. After the consumer went away this does nothing."""
        if not self.closed.is_set() and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.queue.put_nowait, event)


@dataclass(kw_only=True)
class Times:
    """When a sequence came, left the queue, and had its first token, by the decode loop's clock."""

    came_s: float = 0.0
    admitted_s: float = 0.0
    first_s: float = 0.0


@dataclass(kw_only=True, eq=False)
class Sequence:
    """State of one generation. Touched by the decode loop's thread only, but for `outbox`. `may_go_back`: its cache is
    one of `kvcache.new_cache`, so drafts that were wrong can be taken out again. `alpha`: see `Lane`."""

    sequence_id: int
    request: GenerationRequest
    outbox: Outbox
    end_ids: frozenset[int]
    cache: DynamicCache
    sampler: Sampler
    # Most tokens of the prompt that one step takes; None takes it whole.
    prefill_chunk: int | None = None
    may_go_back: bool = False
    alpha: float = 0.0
    clock: Callable[[], float] = time.monotonic
    # What the next step takes: the prompt or a chunk of it, then each sampled token, and guesses for those behind it.
    fresh_ids: list[int] = field(init=False)
    draft_ids: list[int] = field(default_factory=list)
    # The prompt's and the answer's tokens so far.
    ids: list[int] = field(init=False)
    # Guesses worth making: one more than were right the last time.
    hope: int = 1 << 10
    # The lanes of the last step.
    lanes: list[Lane] = field(default_factory=list)
    position: int = 0  # of fresh_ids[0]; so many tokens are in the cache
    cached_tokens: int = 0  # of the prompt, that were in the cache from the beginning
    completion_tokens: int = 0
    finish_reason: FinishReason | None = None
    end: Token | None = None  # the token that ended it, which is not delivered
    # Where something is to be told of every token; else nothing is kept.
    reader: Reader | None = None
    decode_tally: Tally = field(default_factory=Tally)
    shadowed: Shadowed = field(default_factory=Shadowed)
    times: Times = field(default_factory=Times)

    def __post_init__(self) -> None:
        self.fresh_ids = self.chunk_at(0)
        self.ids = list(self.request.prompt_ids)
        self.times.came_s = self.clock()
        if self.request.reads_prompt:
            self.reader = Reader(request=self.request)

    @property
    def is_prompt(self) -> bool:
        """Whether the next step takes tokens of the prompt."""
        return self.position < len(self.request.prompt_ids)

    @property
    def is_new(self) -> bool:
        """Whether no step has taken anything of it."""
        return self.is_prompt and self.position == self.cached_tokens

    @property
    def cancelled(self) -> bool:
        """The consumer has closed its iterator."""
        return self.outbox.closed.is_set()

    @property
    def draft_room(self) -> int:
        """Most tokens worth guessing behind the newest: no more than may still be delivered."""
        return min(self.hope, self.request.max_tokens - self.completion_tokens - 1) if self.may_go_back else 0

    def begin(self, *, cached_tokens: int) -> None:
        """It runs from now on; so many tokens of the prompt are in its cache."""
        self.times.admitted_s = self.clock()
        self.position = self.cached_tokens = cached_tokens
        self.fresh_ids = self.chunk_at(cached_tokens)

    def chunk_at(self, position: int) -> list[int]:
        """The tokens of the prompt that a step at `position` takes; none behind the prompt."""
        end = None if self.prefill_chunk is None else position + self.prefill_chunk
        return list(self.request.prompt_ids[position:end])

    def advance(self) -> None:
        """The fresh tokens of the prompt are in the cache now; the next ones are fresh."""
        self.position += len(self.fresh_ids)
        self.fresh_ids = self.chunk_at(self.position)

    def take(self, rows: Rows[torch.Tensor]) -> int:
        """Take what a step brought: after a prompt's chunk that is not its last, nothing; else the next token from each
        of the rows logits_V as long as the drafts were right. How many rows were of use; the rest is taken out of the
        cache. `finish_reason` is set if the sequence is over."""
        if self.is_prompt:
            if not self._take_prompt():
                self._trim()
                return 1
        else:
            self.position += 1
        kept = 1
        while not self._accept(self._token(rows[kept - 1], kept)) and self._was_right(kept):
            kept += 1
            self.position += 1
        if kept < len(rows):
            truncate_cache(self.cache, length=self.position)
        self._trim()
        if self.draft_ids:
            self.hope = kept
        self.draft_ids = []
        return kept

    def _take_prompt(self) -> bool:
        """A chunk of the prompt is in the cache now. Whether a token of the answer comes next."""
        if self.reader is not None:
            self.reader.read_prompt(self.lanes[0])
        self.advance()
        if self.is_prompt:
            return False
        if self.reader is not None:
            self.outbox.put(self.reader.prompt())
        if self.request.max_tokens == 0:
            self.times.first_s = self.clock()
            self.finish_reason = "length"
        return self.finish_reason is None

    def _token(self, logits_V: torch.Tensor, kept: int) -> Token:
        token = self.sampler.next_token(logits_V, self.ids)
        if not self.request.routed_experts or self.lanes[0].is_prompt:
            return token
        return replace(token, experts_TLK=experts_of(self.lanes[kept - 1]))

    def _trim(self) -> None:
        if self.may_go_back:
            trim_cache(self.cache)

    def _was_right(self, kept: int) -> bool:
        return kept <= len(self.draft_ids) and [self.draft_ids[kept - 1]] == self.fresh_ids

    def _accept(self, token: Token) -> bool:
        """Take a sampled token; deliver it unless it ends the sequence. Whether that is over."""
        if not self.completion_tokens:
            self.times.first_s = self.clock()
        self.completion_tokens += 1
        self.fresh_ids = [token.token_id]
        self.ids.append(token.token_id)
        if token.token_id in self.end_ids:
            self.finish_reason, self.end = "stop", token
        else:
            tally = self.decode_tally
            substituted = Substituted(tally.substituted, tally.activations) if self.alpha > 0 else None
            self.outbox.put(replace(token, substituted=substituted))
            if self.completion_tokens >= self.request.max_tokens:
                self.finish_reason = "length"
        return self.finish_reason is not None

    def deliver_end(self) -> None:
        """Deliver the last event."""
        assert self.finish_reason is not None
        times = self.times
        self.outbox.put(
            Finished(
                reason=self.finish_reason,
                prompt_tokens=len(self.request.prompt_ids),
                completion_tokens=self.completion_tokens,
                expert_stats=self.decode_tally.stats(),
                queue_s=times.admitted_s - times.came_s,
                prefill_s=times.first_s - times.admitted_s,
                decode_s=self.clock() - times.first_s,
                cached_tokens=self.cached_tokens,
                end=self.end,
            )
        )
