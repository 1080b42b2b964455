"""What /metrics tells of requests, as a client sees them, and the page itself. Knows Prometheus; the engine knows
nothing of it.

Names carry vLLM's suffixes under a prefix of our own, so that its dashboards need only another prefix. What the engine
counts is read from its health at each scrape, and not counted a second time here; only times as a client sees them
are measured here.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest

from odmoe_server.engine_api import Engine, Finished, NotReady, QueueFull
from odmoe_server.engine_metrics import EngineCollector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Outcome = Literal["stop", "length", "abort", "error"]

_FIRST_TOKEN_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_BETWEEN_TOKENS_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5)
_WHOLE_S = (0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_PHASE_S = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16_384, 65_536, 262_144)


class Metrics:
    """The registry of one application; two of them in one process do not meet."""

    def __init__(
        self,
        engine: Engine,
        *,
        model_name: str,
        prefix: str = "odmoe",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.registry = CollectorRegistry()
        self.clock = clock
        self._model_name = model_name
        ProcessCollector(registry=self.registry)
        self.registry.register(EngineCollector(engine, model_name=model_name, prefix=prefix))

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            family = Histogram(
                f"{prefix}:{name}", text, labelnames=("model_name",), buckets=buckets, registry=self.registry
            )
            return family.labels(model_name)

        self.time_to_first_token = histogram(
            "time_to_first_token_seconds", "From the request's arrival to its first token.", _FIRST_TOKEN_S
        )
        self.inter_token_latency = histogram(
            "inter_token_latency_seconds", "From one token of an answer to its next.", _BETWEEN_TOKENS_S
        )
        self.e2e_latency = histogram(
            "e2e_request_latency_seconds", "From the request's arrival to the end of its answer.", _WHOLE_S
        )
        self.queue_time = histogram(
            "request_queue_time_seconds", "In the queue. Of answers the engine ended.", _PHASE_S
        )
        self.prefill_time = histogram(
            "request_prefill_time_seconds", "From the queue to the first token. Of answers the engine ended.", _PHASE_S
        )
        self.decode_time = histogram(
            "request_decode_time_seconds", "From the first token to the last. Of answers the engine ended.", _PHASE_S
        )
        self.prompt_tokens = histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self.generation_tokens = histogram("request_generation_tokens", "Tokens of an answer.", _TOKENS)

        def counter(name: str, text: str) -> Counter:
            family = Counter(f"{prefix}:{name}", text, labelnames=("model_name",), registry=self.registry)
            return family.labels(model_name)

        self.prefix_queries = counter(
            "prefix_cache_queries", "Prompt tokens that were looked up in the cache. Of answers the engine ended."
        )
        self.prefix_hits = counter("prefix_cache_hits", "Those of them whose keys and values were there already.")
        self._outcomes = Counter(
            f"{prefix}:request_success",
            "Requests that were begun, by how they ended: stop, length, abort (client gone), error.",
            labelnames=("model_name", "finished_reason"),
            registry=self.registry,
        )
        for outcome in ("stop", "length", "abort", "error"):
            self._outcomes.labels(model_name, outcome)
        self._http = Counter(
            "http_requests", "HTTP answers.", labelnames=("handler", "method", "status"), registry=self.registry
        )

    def ended(self, outcome: Outcome) -> None:
        """Count a request that was begun."""
        self._outcomes.labels(self._model_name, outcome).inc()

    def http_answer(self, *, handler: str, method: str, status: int) -> None:
        """Count an HTTP answer; `handler` is the route's pattern, not the address that was asked for."""
        self._http.labels(handler, method, str(status)).inc()

    def page(self) -> bytes:
        """The body of GET /metrics."""
        return generate_latest(self.registry)


@dataclass(frozen=True, kw_only=True)
class Times:
    """Of one answer, as the HTTP side saw it: seconds from the request's arrival to the first token, from there to
    the newest, and how many tokens that were."""

    first_token_s: float
    answer_s: float
    num_tokens: int


class Meter:
    """Measures one request: entered when it begins, left when it is over or given up."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._arrived_s = metrics.clock()
        self._first_token_s: float | None = None
        self._last_token_s: float | None = None
        self._num_tokens = 0
        self._outcome: Outcome | None = None

    def token(self) -> None:
        """A token came."""
        now_s = self._metrics.clock()
        if self._last_token_s is None:
            self._first_token_s = now_s
            self._metrics.time_to_first_token.observe(now_s - self._arrived_s)
        else:
            self._metrics.inter_token_latency.observe(now_s - self._last_token_s)
        self._last_token_s = now_s
        self._num_tokens += 1

    def times(self) -> Times:
        """Of the tokens so far; an answer without any took its time to find that out."""
        first_s = self._metrics.clock() if self._first_token_s is None else self._first_token_s
        last_s = first_s if self._last_token_s is None else self._last_token_s
        return Times(first_token_s=first_s - self._arrived_s, answer_s=last_s - first_s, num_tokens=self._num_tokens)

    def finished(self, outcome: Outcome) -> None:
        """The answer is complete."""
        self._outcome = outcome

    def sized(self, *, prompt_tokens: int, generation_tokens: int) -> None:
        """So much went in and came out; of complete answers."""
        self._metrics.prompt_tokens.observe(prompt_tokens)
        self._metrics.generation_tokens.observe(generation_tokens)

    def told(self, event: Finished) -> None:
        """What only the engine knows of an answer that it ended."""
        self._metrics.queue_time.observe(event.queue_s)
        self._metrics.prefill_time.observe(event.prefill_s)
        self._metrics.decode_time.observe(event.decode_s)
        self._metrics.prefix_queries.inc(event.prompt_tokens)
        self._metrics.prefix_hits.inc(event.cached_tokens)

    def __enter__(self) -> "Meter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, QueueFull | NotReady):
            return  # never begun
        if self._outcome is not None:
            self._metrics.e2e_latency.observe(self._metrics.clock() - self._arrived_s)
            self._metrics.ended(self._outcome)
        else:
            # GeneratorExit and CancelledError, by which a consumer gives up, are no Exceptions.
            self._metrics.ended("error" if isinstance(error, Exception) or error is None else "abort")
