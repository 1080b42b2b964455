"""What the HTTP side may ask of the engine. Knows nothing of HTTP, text or the model's insides.

The HTTP side renders and tokenises; the engine takes token ids and gives token ids. Text (detokenising, stop
strings) is the HTTP side's business: when it has seen enough it closes the iterator, which ends the sequence.
"""

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:  # the HTTP side can be imported without it
    from torch import Tensor

FinishReason = Literal["stop", "length"]


class Constraint(Protocol):
    """What an answer may be, such as a grammar. Safe to start from any thread."""

    def start(self) -> "Callable[[Sequence[int], Tensor], Tensor]":
        """For one sequence. The function is called once for each token of the answer, in order and on one thread, with
        the answer's tokens so far and scores_V (float32, CPU), and returns them with what must not come next at -inf.
        End tokens are tokens like others: it must allow one where the answer may end."""
        ...


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose the next token. `temperature` 0 is greedy; `top_k` 0 and `min_p` 0 are off. Presence and frequency
    penalties count the answer's tokens, the repetition penalty the prompt's too. `logit_bias` has tokens and what is
    added to theirs. `stop_token_ids` come on top of the model's end tokens, which `ignore_eos` switches off; neither
    is chosen before `min_tokens`. `top_logprobs`: None for no log probabilities; else the chosen token's and those
    of as many of the likeliest, all of them the model's own, before anything here has touched them."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    min_tokens: int = 0
    top_logprobs: int | None = None
    constraint: Constraint | None = None


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One sequence to generate. `prompt_ids` is not empty and len(prompt_ids) + max_tokens fits the context. What one
    `tenant` sent speeds up only its own prompts. `alpha`: how far below the others an expert may score to be replaced
    by one that is at hand; 0 replaces none, None is the server's own. Servers that replace none do not look at it.

    `max_tokens` may be 0 where the prompt is only to be read. `prompt_logprobs`: as `Sampling.top_logprobs`, of the
    prompt's tokens. `routed_experts`: tell which experts computed each token. For either the whole prompt is computed,
    whatever is known of its head."""

    request_id: str
    prompt_ids: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    tenant: str = ""
    alpha: float | None = None
    prompt_logprobs: int | None = None
    routed_experts: bool = False

    @property
    def reads_prompt(self) -> bool:
        """Whether something is to be told of each token of the prompt."""
        return self.prompt_logprobs is not None or self.routed_experts


@dataclass(frozen=True)
class Substituted:
    """Of the experts the gates have chosen for an answer so far, others stood in for `count`."""

    count: int = 0
    out_of: int = 0


@dataclass(frozen=True)
class Token:
    """The next token of the sequence. End tokens are not delivered. With log probabilities asked for: `logprob` is its
    own, `top` the likeliest tokens' ids and theirs, best first; of a prompt's tokens, `rank` is its place among all,
    from 1. Where experts may be replaced, `substituted` says how many have been. `experts_TLK`, where asked for: which
    experts computed the token before it, if that was not the prompt's."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    substituted: Substituted | None = None
    rank: int | None = None
    experts_TLK: "Tensor | None" = None


@dataclass(frozen=True, kw_only=True)
class ReadPrompt:
    """Comes first where something was to be told of the prompt. `tokens`: its own, the first without a log probability,
    since nothing stands before it; none where none were asked for. `experts_TLK`: for each of its tokens and each MoE
    layer which experts computed it."""

    tokens: tuple[Token, ...] = ()
    experts_TLK: "Tensor | None" = None


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The last event of every generation that was not closed by its consumer. `completion_tokens` counts the end
    token too, as OpenAI's usage does; that is `end`, if one ended it. The times follow one another: in the queue, from
    there to the first token, and from there to the last."""

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    expert_stats: "ExpertStats"
    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    cached_tokens: int = 0
    end: Token | None = None


@dataclass(frozen=True, kw_only=True)
class ExpertStats:
    """What the experts of one generation's decode steps cost. Activations = experts the gate chose, summed over
    layers and steps. `predicted` of them were in a forecast that came before the gate spoke, `predicted_late` in one
    that came after it (known for the engine's totals only); the recall is the two together by activations. `hit`
    lay in their slot when the compute arrived, `late` were being loaded, `missed` had to be ordered by the compute.
    `wait_s` adds up what each expert was waited for, `stall_s` only the longest wait of each layer: nodes wait side by
    side. `drafted` tokens were taken from the shadow and verified, `accepted` of them were right. `substituted`
    activations were served by another expert (importance mode only). `loaded_bytes` were copied into slots for these
    activations; what wrong forecasts loaded is not in it, and what several answers shared counts for each of them."""

    activations: int = 0
    predicted: int = 0
    predicted_late: int = 0
    hit: int = 0
    late: int = 0
    missed: int = 0
    wait_s: float = 0.0
    stall_s: float = 0.0
    drafted: int = 0
    accepted: int = 0
    substituted: int = 0
    loaded_bytes: int = 0


class EngineError(Exception):
    """Base of what `generate` may raise."""


class QueueFull(EngineError):
    """Too many requests wait already; try again after `retry_after_s`."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NotReady(EngineError):
    """Still loading, too few nodes, or shutting down; the message says which."""


class TooLarge(EngineError):
    """The request can never fit the server's memory; the message says what would."""


class GenerationFailed(EngineError):
    """The generation broke off for a reason that is the server's; the message has no internals."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Durations by size: `counts` has one place more than `bounds`, for what is longer than the last of them."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float


@dataclass(frozen=True, kw_only=True)
class LayerOutcomes:
    """How decode steps found the experts of one MoE layer (see `ExpertStats`)."""

    layer: int
    hit: int
    late: int
    missed: int
    substituted: int = 0


@dataclass(frozen=True, kw_only=True)
class NodeHealth:
    """One peer as the server sees it. What its own reports tell is 0 or None until the first of them came;
    `rpc_times` is what the server measured, from a compute to its answer. `bad_messages_total`: what the server got
    from it and did not accept; `protocol_errors_total`: what it did not accept itself. A predictor's `forecasts_total`
    counts a message for each receiver."""

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
    load_times: Spread | None = None
    rpc_times: Spread | None = None
    loads_failed_total: int = 0
    loads_cancelled_total: int = 0
    loads_broken_off_total: int = 0
    broken_off_s_total: float = 0.0
    evictions_total: int = 0
    late_forecasts_total: int = 0
    stale_total: int = 0
    duplicates_total: int = 0
    expired_total: int = 0
    overflowed_total: int = 0
    undelivered_total: int = 0
    loop_errors_total: int = 0
    protocol_errors_total: int = 0
    bad_messages_total: int = 0
    forecasts_total: int = 0
    rebirths_total: int = 0


@dataclass(frozen=True, kw_only=True)
class ClusterFigures:
    """What the server's side of the cluster counted. `stale_total`: forecasts placed by a view that was over;
    `duplicates_total`: answers nobody waited for any more; `realigns_total`: times the shadow had gone on with a wrong
    token. `lead_layers`: how far the newest forecast is ahead of the full model. `story`: what happened lately, oldest
    first: how many seconds ago, and a sentence."""

    epoch: int = 0
    rejoins_total: int = 0
    stale_total: int = 0
    duplicates_total: int = 0
    realigns_total: int = 0
    loop_errors_total: int = 0
    lead_layers: int | None = None
    layers: tuple[LayerOutcomes, ...] = ()
    story: tuple[tuple[float, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class EngineHealth:
    """`state`: loading (weights), waiting (for nodes), ready, stopping, dead. `detail` is a sentence for a person.
    `failures_total`: generations that ended for a reason nobody foresaw (a bug). Keys and values: what running
    sequences may come to at most, what prompt heads take that may come again, and the budget for both."""

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
    kv_reserved_bytes: int = 0
    kv_prefix_bytes: int = 0
    kv_budget_bytes: int = 0
    cluster: ClusterFigures = ClusterFigures()


class Engine(Protocol):
    """Safe to call from the event loop; never blocks it."""

    @property
    def context_length(self) -> int:
        """Most tokens prompt and answer may have together."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[ReadPrompt | Token | Finished, None]:
        """`ReadPrompt` where asked for, tokens as they come, then `Finished`. Raises `QueueFull`, `TooLarge` or
        `NotReady` before the first token, `GenerationFailed` at any time. Closing the generator ends the sequence
        within one step."""
        ...

    def health(self) -> EngineHealth:
        """A snapshot, cheap enough for every probe."""
        ...
