"""The engine's health as Prometheus families. Knows Prometheus and the health; counts nothing itself.

Names carry vLLM's suffixes where vLLM has the like. Peers that left keep their counters, so that none goes backwards.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Final, Literal

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from odmoe_server.engine_api import Engine, EngineHealth, LayerOutcomes, NodeHealth, Spread

STATES: Final = ("loading", "waiting", "ready", "stopping", "dead")


@dataclass(frozen=True)
class _Family:
    text: str
    kind: Literal["gauge", "counter"]
    value: Callable[[NodeHealth], float]


class EngineCollector(Collector):
    """One snapshot a scrape."""

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
        yield from self._by_layer(health.cluster.layers)
        yield from self._cluster(health)
        yield from self._peers(health.nodes)

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
        kv = GaugeMetricFamily(
            f"{self._prefix}:kv_cache_bytes",
            "Keys and values: what running requests may come to at most (running), prompt heads kept in case they come"
            " again (prefix), and the budget for both.",
            labels=("kind",),
        )
        for kind, num_bytes in (
            ("running", health.kv_reserved_bytes),
            ("prefix", health.kv_prefix_bytes),
            ("budget", health.kv_budget_bytes),
        ):
            kv.add_metric((kind,), num_bytes)
        yield kv
        if health.kv_budget_bytes:
            used = (health.kv_reserved_bytes + health.kv_prefix_bytes) / health.kv_budget_bytes
            yield self._gauge("kv_cache_usage_perc", "Share of that budget that is taken, 0 to 1.", used)
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
        if totals.activations:
            recall = (totals.predicted + totals.predicted_late) / totals.activations
            text = "Share of the activations that was forecast, in time or not."
            yield self._gauge("expert_prediction_recall", text, recall)
        yield self._counter("expert_wait_seconds", "Time computes waited for experts.", totals.wait_s)
        text = "Time decode steps waited for experts: of each layer, the longest wait."
        yield self._counter("expert_stall_seconds", text, totals.stall_s)
        text = "Tokens taken from the shadow and verified."
        yield self._counter("spec_decode_num_draft_tokens", text, totals.drafted)
        yield self._counter("spec_decode_num_accepted_tokens", "Those of them that were right.", totals.accepted)

    def _by_layer(self, layers: Iterable[LayerOutcomes]) -> Iterable[Metric]:
        outcomes = CounterMetricFamily(
            f"{self._prefix}:expert_predictions",
            "Experts of decode steps by how the compute found them: hit (in its slot), late (being loaded), miss (not"
            " ordered yet).",
            labels=("layer", "outcome"),
        )
        replaced = CounterMetricFamily(
            f"{self._prefix}:expert_substitutions",
            "Activations served by another expert (importance mode).",
            labels=("layer",),
        )
        for layer in layers:
            for outcome, count in (("hit", layer.hit), ("late", layer.late), ("miss", layer.missed)):
                outcomes.add_metric((str(layer.layer), outcome), count)
            replaced.add_metric((str(layer.layer),), layer.substituted)
        yield from (outcomes, replaced)

    def _cluster(self, health: EngineHealth) -> Iterable[Metric]:
        cluster = health.cluster
        yield self._counter("failovers", "Computations given to another node.", health.failovers_total)
        yield self._counter("failures", "Answers that broke off for a reason nobody foresaw.", health.failures_total)
        yield self._counter("protocol_errors", "Messages the server did not accept.", health.protocol_errors_total)
        yield self._counter("loop_errors", "Events the server's cluster thread failed on.", cluster.loop_errors_total)
        yield self._counter("stale_forecasts", "Forecasts placed by a view that was over.", cluster.stale_total)
        yield self._counter("duplicate_answers", "Answers nobody waited for any more.", cluster.duplicates_total)
        yield self._counter("node_rejoins", "Peers that came back.", cluster.rejoins_total)
        text = "Times the shadow had gone on with a wrong token and was set right."
        yield self._counter("shadow_realign", text, cluster.realigns_total)
        if cluster.lead_layers is not None:
            text = "Layers the newest forecast is ahead of the full model."
            yield self._gauge("shadow_lead_layers", text, cluster.lead_layers)
        yield self._gauge("cluster_epoch", "Grows with each change of membership.", cluster.epoch)
        yield self._gauge("predictor_up", "1 if the predictor is alive.", health.predictor_alive)

    def _peers(self, peers: Iterable[NodeHealth]) -> Iterable[Metric]:
        up = GaugeMetricFamily(f"{self._prefix}:node_up", "1 if the peer is alive.", labels=("node", "role"))
        slots = GaugeMetricFamily(f"{self._prefix}:expert_slots", "Expert slots.", labels=("node", "state"))
        loads = self._histogram("expert_load_seconds", "What each whole load of an expert took the node.")
        rpcs = self._histogram("rpc_seconds", "From a compute to its answer, as the server saw it.")
        tables = {role: self._tabled(table) for role, table in _TABLES.items()}
        for peer in peers:
            up.add_metric((peer.peer_id, peer.role), peer.alive)
            for name, family in _TABLES[peer.role].items():
                tables[peer.role][name].add_metric((peer.peer_id,), family.value(peer))
            if peer.role == "node":
                slots.add_metric((peer.peer_id, "used"), peer.used_slots)
                slots.add_metric((peer.peer_id, "free"), peer.slots - peer.used_slots)
                _add(loads, peer.peer_id, peer.load_times)
                _add(rpcs, peer.peer_id, peer.rpc_times)
        yield from (up, slots, loads, rpcs)
        for families in tables.values():
            yield from families.values()

    def _histogram(self, name: str, text: str) -> HistogramMetricFamily:
        return HistogramMetricFamily(f"{self._prefix}:{name}", text, labels=("node",))

    def _tabled(self, table: Mapping[str, _Family]) -> dict[str, GaugeMetricFamily | CounterMetricFamily]:
        kinds = {"gauge": GaugeMetricFamily, "counter": CounterMetricFamily}
        return {
            name: kinds[family.kind](f"{self._prefix}:{name}", family.text, labels=("node",))
            for name, family in table.items()
        }


def _add(family: HistogramMetricFamily, peer_id: str, spread: Spread | None) -> None:
    if spread is None:
        return
    at_most = [str(float(bound)) for bound in spread.bounds] + ["+Inf"]
    buckets = list(zip(at_most, accumulate(spread.counts), strict=True))
    family.add_metric((peer_id,), buckets=buckets, sum_value=spread.sum)


_NODES: Final[dict[str, _Family]] = {
    "expert_accounted_bytes": _Family("Bytes of experts in slots.", "gauge", lambda node: node.accounted_bytes),
    "expert_budget_bytes": _Family("Bytes a node may hold.", "gauge", lambda node: node.budget_bytes),
    "node_rss_bytes": _Family("Resident memory of the node's process.", "gauge", lambda node: node.rss_bytes),
    "expert_loads": _Family("Experts loaded.", "counter", lambda node: node.loads_total),
    "expert_loads_unused": _Family("Experts loaded for nothing.", "counter", lambda node: node.loads_unused_total),
    "expert_loads_failed": _Family("Loads that failed.", "counter", lambda node: node.loads_failed_total),
    "expert_loads_cancelled": _Family(
        "Loads given up before they began.", "counter", lambda node: node.loads_cancelled_total
    ),
    "expert_loads_broken_off": _Family(
        "Loads stopped midway for something more urgent.", "counter", lambda node: node.loads_broken_off_total
    ),
    "expert_broken_off_seconds": _Family(
        "Time spent on loads that were stopped.", "counter", lambda node: node.broken_off_s_total
    ),
    "expert_evictions": _Family(
        "Experts that had to leave their slot for another.", "counter", lambda node: node.evictions_total
    ),
    "expert_load_bytes": _Family("Bytes of experts loaded.", "counter", lambda node: node.load_bytes_total),
    "expert_compute_seconds": _Family("Time spent computing experts.", "counter", lambda node: node.compute_s_total),
    "node_late_forecasts": _Family(
        "Forecasts that came when their layer was over.", "counter", lambda node: node.late_forecasts_total
    ),
    "node_stale_messages": _Family("Messages of a former view or server.", "counter", lambda node: node.stale_total),
    "node_duplicate_computes": _Family("Computes that came twice.", "counter", lambda node: node.duplicates_total),
    "node_expired_computes": _Family(
        "Computes whose time was over before they were done.", "counter", lambda node: node.expired_total
    ),
    "node_overflows": _Family(
        "Forecasts and loads there was no room to note.", "counter", lambda node: node.overflowed_total
    ),
}
_EVERY_PEER: Final[dict[str, _Family]] = {
    "undelivered": _Family(
        "Messages the peer could not send, because the receiver was not there.",
        "counter",
        lambda peer: peer.undelivered_total,
    ),
    "loop_errors": _Family("Events the peer failed on.", "counter", lambda peer: peer.loop_errors_total),
    "protocol_errors": _Family("Messages the peer did not accept.", "counter", lambda peer: peer.protocol_errors_total),
    "bad_messages": _Family(
        "Messages of the peer the server did not accept.", "counter", lambda peer: peer.bad_messages_total
    ),
}
_TABLES: Final[dict[str, dict[str, _Family]]] = {
    "node": {**_NODES, **{f"node_{name}": family for name, family in _EVERY_PEER.items()}},
    "predictor": {
        "predictor_forecasts": _Family(
            "Forecasts sent, one for each receiver.", "counter", lambda peer: peer.forecasts_total
        ),
        "predictor_rebirths": _Family(
            "Times the predictor forgot every sequence and came back.", "counter", lambda peer: peer.rebirths_total
        ),
        **{f"predictor_{name}": family for name, family in _EVERY_PEER.items()},
    },
}
