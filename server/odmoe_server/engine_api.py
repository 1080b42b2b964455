"""What the HTTP side may ask of the engine. Knows nothing of HTTP, text or the model's insides.

The HTTP side renders and tokenises; the engine takes token ids and gives token ids. Text (detokenising, stop
strings) is the HTTP side's business: when it has seen enough it closes the iterator, which ends the sequence.
"""

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Literal, Protocol

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose the next token. `temperature` 0 is greedy. `stop_token_ids` come on top of the model's own end
    tokens, which `ignore_eos` switches off."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One sequence to generate. `prompt_ids` is not empty and len(prompt_ids) + max_tokens fits the context."""

    request_id: str
    prompt_ids: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True)
class Token:
    """The next token of the sequence. End tokens are not delivered."""

    token_id: int


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The last event of every generation that was not closed by its consumer. `completion_tokens` counts the end
    token too, as OpenAI's usage does."""

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    expert_stats: "ExpertStats"


@dataclass(frozen=True, kw_only=True)
class ExpertStats:
    """What the experts of one generation's decode steps cost. Activations = experts the gate chose, summed over
    layers and steps. `predicted` of them were in a forecast that came before the gate spoke, `predicted_late` in one
    that came after it (known for the engine's totals only); the recall is the two together by activations. `hit`
    lay in their slot when the compute arrived, `late` were being loaded, `missed` had to be ordered by the compute.
    `wait_s` adds up what each expert was waited for, `stall_s` only the longest wait of each layer: nodes wait side by
    side."""

    activations: int = 0
    predicted: int = 0
    predicted_late: int = 0
    hit: int = 0
    late: int = 0
    missed: int = 0
    wait_s: float = 0.0
    stall_s: float = 0.0


class EngineError(Exception):
    """Base of what `generate` may raise."""


class QueueFull(EngineError):
    """Too many requests wait already; try again after `retry_after_s`."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NotReady(EngineError):
    """Still loading, too few nodes, or shutting down; the message says which."""


class GenerationFailed(EngineError):
    """The generation broke off for a reason that is the server's; the message has no internals."""


@dataclass(frozen=True, kw_only=True)
class NodeHealth:
    """One peer as the server sees it."""

    peer_id: str
    role: Literal["node", "predictor"]
    alive: bool
    slots: int
    used_slots: int
    accounted_bytes: int
    budget_bytes: int
    rss_bytes: int
    loads_total: int
    loads_unused_total: int
    load_bytes_total: int
    load_s_total: float
    compute_s_total: float


@dataclass(frozen=True, kw_only=True)
class EngineHealth:
    """`state`: loading (weights), waiting (for nodes), ready, stopping, dead. `detail` is a sentence for a person.
    `failures_total`: generations that ended for a reason nobody foresaw (a bug)."""

    state: Literal["loading", "waiting", "ready", "stopping", "dead"]
    detail: str
    running: int
    queued: int
    predictor_alive: bool
    nodes: tuple[NodeHealth, ...]
    totals: ExpertStats
    failovers_total: int
    prompt_tokens_total: int
    generation_tokens_total: int
    protocol_errors_total: int
    failures_total: int = 0


class Engine(Protocol):
    """Safe to call from the event loop; never blocks it."""

    @property
    def context_length(self) -> int:
        """Most tokens prompt and answer may have together."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Token | Finished, None]:
        """Tokens as they come, then `Finished`. Raises `QueueFull` or `NotReady` before the first token,
        `GenerationFailed` at any time. Closing the generator ends the sequence within one step."""
        ...

    def health(self) -> EngineHealth:
        """A snapshot, cheap enough for every probe."""
        ...
