"""What /metrics tells. Knows Prometheus and the engine's health; the engine knows nothing of it.

Names carry vLLM's suffixes under a prefix of our own, so that its dashboards need only another prefix. What the engine
counts is read from its health at each scrape, and not counted a second time here; only times as a client sees them
are measured here.
"""

import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from odmoe_server.engine_api import Engine, EngineHealth, NodeHealth, NotReady, QueueFull

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
STATES = ("loading", "waiting", "ready", "stopping", "dead")
Outcome = Literal["stop", "length", "abort", "error"]

_FIRST_TOKEN_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_BETWEEN_TOKENS_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5)
_WHOLE_S = (0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


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


class Meter:
    """Measures one request: entered when it begins, left when it is over or given up."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._arrived_s = metrics.clock()
        self._last_token_s: float | None = None
        self._outcome: Outcome | None = None

    def token(self) -> None:
        """A token came."""
        now_s = self._metrics.clock()
        if self._last_token_s is None:
            self._metrics.time_to_first_token.observe(now_s - self._arrived_s)
        else:
            self._metrics.inter_token_latency.observe(now_s - self._last_token_s)
        self._last_token_s = now_s

    def finished(self, outcome: Outcome) -> None:
        """The answer is complete."""
        self._outcome = outcome

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


class EngineCollector(Collector):
    """The engine's health as Prometheus families."""

    def __init__(self, engine: Engine, *, model_name: str, prefix: str) -> None:
        self._engine = engine
        self._model_name = model_name
        self._prefix = prefix

    def describe(self) -> Iterable[Metric]:
        """Nothing: there is no need to ask the engine just to register."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """All families, from one snapshot."""
        health = self._engine.health()
        yield from self._requests(health)
        yield from self._experts(health)
        yield from self._nodes(health.nodes)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"{self._prefix}:{name}", text, labels=("model_name",))
        family.add_metric((self._model_name,), value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(f"{self._prefix}:{name}", text, labels=("model_name",))
        family.add_metric((self._model_name,), value)
        return family

    def _requests(self, health: EngineHealth) -> Iterable[Metric]:
        yield self._gauge("num_requests_running", "Requests being answered.", health.running)
        yield self._gauge("num_requests_waiting", "Requests in the queue.", health.queued)
        yield self._counter("prompt_tokens", "Prompt tokens computed.", health.prompt_tokens_total)
        yield self._counter("generation_tokens", "Tokens generated.", health.generation_tokens_total)
        state = GaugeMetricFamily(f"{self._prefix}:engine_state", "1 for the engine's state.", labels=("state",))
        for name in STATES:
            state.add_metric((name,), health.state == name)
        yield state

    def _experts(self, health: EngineHealth) -> Iterable[Metric]:
        totals = health.totals
        yield self._counter(
            "expert_activations", "Experts the gate chose in decode steps, over layers and steps.", totals.activations
        )
        yield self._counter(
            "expert_activations_predicted", "Those of them in a forecast before the gate spoke.", totals.predicted
        )
        yield self._counter(
            "expert_activations_predicted_late", "Those of them in a forecast after it.", totals.predicted_late
        )
        outcomes = CounterMetricFamily(
            f"{self._prefix}:expert_predictions",
            "Experts by how the compute found them: hit (in its slot), late (being loaded), miss (not ordered yet).",
            labels=("outcome",),
        )
        for outcome, count in (("hit", totals.hit), ("late", totals.late), ("miss", totals.missed)):
            outcomes.add_metric((outcome,), count)
        yield outcomes
        if totals.activations:
            recall = (totals.predicted + totals.predicted_late) / totals.activations
            text = "Share of the activations that was forecast, in time or not."
            yield self._gauge("expert_prediction_recall", text, recall)
        yield self._counter("expert_wait_seconds", "Time computes waited for experts.", totals.wait_s)
        text = "Time decode steps waited for experts: of each layer, the longest wait."
        yield self._counter("expert_stall_seconds", text, totals.stall_s)
        yield self._counter("failovers", "Computations given to another node.", health.failovers_total)
        yield self._counter("failures", "Answers that broke off for a reason nobody foresaw.", health.failures_total)
        yield self._counter("protocol_errors", "Messages that were not accepted.", health.protocol_errors_total)
        yield self._gauge("predictor_up", "1 if the predictor is alive.", health.predictor_alive)

    def _nodes(self, nodes: Iterable[NodeHealth]) -> Iterable[Metric]:
        up = GaugeMetricFamily(f"{self._prefix}:node_up", "1 if the peer is alive.", labels=("node", "role"))
        slots = GaugeMetricFamily(f"{self._prefix}:expert_slots", "Expert slots.", labels=("node", "state"))
        families = {name: self._node_family(name, text, kind) for name, (text, kind, _) in _NODE_FAMILIES.items()}
        for node in nodes:
            up.add_metric((node.peer_id, node.role), node.alive)
            if node.role == "node":
                slots.add_metric((node.peer_id, "used"), node.used_slots)
                slots.add_metric((node.peer_id, "free"), node.slots - node.used_slots)
                for name, (_, _, value_of) in _NODE_FAMILIES.items():
                    families[name].add_metric((node.peer_id,), value_of(node))
        yield from (up, slots, *families.values())

    def _node_family(self, name: str, text: str, kind: str) -> GaugeMetricFamily | CounterMetricFamily:
        family = GaugeMetricFamily if kind == "gauge" else CounterMetricFamily
        return family(f"{self._prefix}:{name}", text, labels=("node",))


_NODE_FAMILIES: dict[str, tuple[str, str, Callable[[NodeHealth], float]]] = {
    "expert_accounted_bytes": ("Bytes of experts in slots.", "gauge", lambda node: node.accounted_bytes),
    "expert_budget_bytes": ("Bytes a node may hold.", "gauge", lambda node: node.budget_bytes),
    "node_rss_bytes": ("Resident memory of the node's process.", "gauge", lambda node: node.rss_bytes),
    "expert_loads": ("Experts loaded.", "counter", lambda node: node.loads_total),
    "expert_loads_unused": ("Experts loaded for nothing.", "counter", lambda node: node.loads_unused_total),
    "expert_load_bytes": ("Bytes of experts loaded.", "counter", lambda node: node.load_bytes_total),
    "expert_load_seconds": ("Time spent loading experts.", "counter", lambda node: node.load_s_total),
    "expert_compute_seconds": ("Time spent computing experts.", "counter", lambda node: node.compute_s_total),
}
