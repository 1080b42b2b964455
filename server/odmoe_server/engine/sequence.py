"""One request on its way through the decode loop. Knows token ids and limits; knows no model, socket or text."""

import asyncio
import threading
from dataclasses import dataclass, field

from transformers import DynamicCache

from odmoe_server.engine.align import Shadowed
from odmoe_server.engine.sampling import Sampler
from odmoe_server.engine_api import (
    EngineError,
    ExpertStats,
    Finished,
    FinishReason,
    GenerationRequest,
    Token,
)
from odmoe_server.moe.remote import Tally

Event = Token | Finished | EngineError


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
class Sequence:
    """State of one generation. Touched by the decode loop's thread only, but for `outbox`."""

    sequence_id: int
    request: GenerationRequest
    outbox: Outbox
    end_ids: frozenset[int]
    cache: DynamicCache
    sampler: Sampler
    # Most tokens of the prompt that one step takes; None takes it whole.
    prefill_chunk: int | None = None
    # What the next step takes: the prompt or a chunk of it, then each sampled token.
    fresh_ids: list[int] = field(init=False)
    position: int = 0  # of fresh_ids[0]; so many tokens are in the cache
    completion_tokens: int = 0
    decode_tally: Tally = field(default_factory=Tally)
    shadowed: Shadowed = field(default_factory=Shadowed)

    def __post_init__(self) -> None:
        self.fresh_ids = self.chunk_at(0)

    @property
    def is_prompt(self) -> bool:
        """Whether the next step takes tokens of the prompt."""
        return self.position < len(self.request.prompt_ids)

    @property
    def cancelled(self) -> bool:
        """The consumer has closed its iterator."""
        return self.outbox.closed.is_set()

    def chunk_at(self, position: int) -> list[int]:
        """The tokens of the prompt that a step at `position` takes; none behind the prompt."""
        end = None if self.prefill_chunk is None else position + self.prefill_chunk
        return list(self.request.prompt_ids[position:end])

    def advance(self) -> None:
        """The fresh tokens are in the cache now; of the prompt, the next ones are fresh."""
        self.position += len(self.fresh_ids)
        self.fresh_ids = self.chunk_at(self.position)

    def accept(self, token_id: int) -> FinishReason | None:
        """Take a sampled token; deliver it unless it ends the sequence. The finish reason, if it is over."""
        self.completion_tokens += 1
        self.fresh_ids = [token_id]
        if token_id in self.end_ids:
            return "stop"
        self.outbox.put(Token(token_id))
        return "length" if self.completion_tokens >= self.request.max_tokens else None

    def finish(self, reason: FinishReason) -> None:
        """Deliver the last event."""
        stats: ExpertStats = self.decode_tally.stats()
        self.outbox.put(
            Finished(
                reason=reason,
                prompt_tokens=len(self.request.prompt_ids),
                completion_tokens=self.completion_tokens,
                expert_stats=stats,
            )
        )
