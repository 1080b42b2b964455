"""What /metrics tells is what happened: held against the messages on the network and what the banks were told to do.

The whole cluster on one thread, in virtual time.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from odmoe_model.store import ExpertStore
from odmoe_server.engine.build import EngineOptions
from odmoe_server.engine_api import EngineHealth
from odmoe_server.metrics import Metrics
from odmoe_wire.messages import Compute, Result, Rollback, Schedule
from support.loopback_cluster import LoopbackCluster
from support.stores import tiny_store

PROMPT = [3, 5, 7, 11, 13]
NUM_TOKENS = 16
NODES = ("a", "b", "c", "d")
MODEL = "tiny"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ExpertStore:
    return ExpertStore.open(tiny_store("mixtral", tmp_path_factory.mktemp("mixtral")), verify=False)


@dataclass
class Watched:
    """A cluster, and how often each bank was told to load."""

    cluster: LoopbackCluster
    loads: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, store: ExpertStore, **shadow: Any) -> "Watched":
        watched = cls(LoopbackCluster(store, options=EngineOptions(endpoint="inproc://unused")))
        watched.cluster.add_predictor(**shadow)
        for node_id in NODES:
            agent = watched.cluster.add_node(node_id, predictor=True)
            agent._bank.load = watched._counting(node_id, agent._bank.load)  # type: ignore[method-assign]
        watched.cluster.await_members(*NODES, "predictor")
        watched.cluster.settle(seconds=1.0)
        return watched

    def _counting(self, node_id: str, load: Callable[..., float]) -> Callable[..., float]:
        def counting(*args: Any, **options: Any) -> float:
            self.loads[node_id] += 1
            return load(*args, **options)

        return counting

    def health(self) -> EngineHealth:
        snapshot = self.cluster.driver.snapshot
        return EngineHealth(
            state="ready",
            detail="ready",
            running=0,
            queued=0,
            predictor_alive=snapshot.predictor_incarnation is not None,
            nodes=snapshot.peers,
            totals=replace(self.cluster.total.stats(), predicted_late=snapshot.predicted_late_total),
            failovers_total=snapshot.failovers_total,
            prompt_tokens_total=0,
            generation_tokens_total=0,
            protocol_errors_total=snapshot.protocol_errors_total,
            cluster=snapshot.figures,
        )

    def page(self) -> Callable[..., float]:
        """What the page says: name of a sample and labels -> the sum of those samples."""
        self.cluster.settle(seconds=1.0)  # the last reports
        text = Metrics(self, model_name=MODEL).page().decode()  # type: ignore[arg-type]  # only its health is asked
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

        def value(name: str, **labels: str) -> float:
            found = [s.value for s in samples if s.name == f"odmoe:{name}" and labels.items() <= s.labels.items()]
            assert found, name
            return sum(found)

        return value

    def said(self, kind: type[Any], *, to: str | None = None) -> Iterator[tuple[str, Any]]:
        """(sender, message) of each message of a kind that arrived."""
        for line in self.cluster.network.story:
            if isinstance(line.message, kind) and line.copies and to in (None, line.target):
                yield line.source, line.message

    def decode_calls(self) -> dict[tuple[Any, int], set[int]]:
        """(span, layer) -> the experts the gate chose there."""
        chosen: dict[tuple[Any, int], set[int]] = {}
        for _, compute in self.said(Compute):
            (span,) = compute.spans
            if span.length == 1:
                chosen.setdefault((span, compute.layer), set()).update(compute.experts)
        return chosen


@pytest.fixture
def watched(store: ExpertStore) -> Watched:
    watched = Watched.of(store)
    for first in (2, 3):
        watched.cluster.generate([first, *PROMPT], max_tokens=NUM_TOKENS)
    return watched


def test_outcomes_waits_and_loads(watched: Watched) -> None:
    page = watched.page()
    computes = {compute.request_id: compute for _, compute in watched.said(Compute)}
    outcomes: Counter[tuple[str, str]] = Counter()
    waits_s: dict[tuple[Any, int], list[float]] = {}
    answers: Counter[str] = Counter()
    for node_id, result in watched.said(Result):
        answers[node_id] += 1
        (span,) = computes[result.request_id].spans
        if span.length > 1:
            continue
        for timing in result.timings:
            outcomes[str(result.layer), timing.outcome] += 1
            waits_s.setdefault((span, result.layer), []).append(timing.wait_s)
    assert outcomes, "else this says nothing"
    for layer in range(watched.cluster.store.manifest.num_moe_layers):
        for outcome in ("hit", "late", "miss"):
            told = page("expert_predictions_total", layer=str(layer), outcome=outcome)
            assert told == outcomes[str(layer), outcome], (layer, outcome)
    assert page("expert_activations_total") == sum(len(experts) for experts in watched.decode_calls().values())
    assert page("expert_wait_seconds_total") == pytest.approx(sum(map(sum, waits_s.values())))
    assert page("expert_stall_seconds_total") == pytest.approx(sum(map(max, waits_s.values())))
    for node_id in NODES:
        assert page("rpc_seconds_count", node=node_id) == answers[node_id]
        loads = watched.loads[node_id]
        assert loads > 0
        assert page("expert_loads_total", node=node_id) == loads
        assert page("expert_load_seconds_count", node=node_id) == loads
        assert page("expert_load_bytes_total", node=node_id) == loads * watched.cluster.store.manifest.record_bytes
        assert page("expert_slots", node=node_id, state="used") == 0
        assert page("node_up", node=node_id) == 1


def test_recall(watched: Watched) -> None:
    page = watched.page()
    forecasts = {(s.span, s.layer): set(s.experts) for _, s in watched.said(Schedule, to="server")}
    chosen = watched.decode_calls()
    named = {key: len(experts & forecasts.get(key, set())) for key, experts in chosen.items()}
    # What was forecast for the last token of a sequence may have come when the sequence was over.
    last: Counter[int] = Counter()
    for span, _ in chosen:
        last[span.sequence] = max(last[span.sequence], span.position)
    doubtful = sum(count for (span, _), count in named.items() if span.position == last[span.sequence])
    told = page("expert_activations_predicted_total") + page("expert_activations_predicted_late_total")
    assert sum(named.values()) - doubtful <= told <= sum(named.values())
    assert page("expert_prediction_recall") == told / sum(map(len, chosen.values()))
    assert page("predictor_forecasts_total") == sum(1 for _ in watched.said(Schedule))
    assert page("shadow_realign_total") == sum(1 for _ in watched.said(Rollback, to="server"))


def test_a_shadow_that_runs_ahead_is_seen_to(store: ExpertStore) -> None:
    watched = Watched.of(store, run_ahead=2)
    state = watched.cluster.state
    leads: set[int | None] = set()
    watched.cluster.each_turn(lambda: leads.add(state.ledger.lead_layers(state.dispatch.forecasts)))
    watched.cluster.generate(PROMPT, max_tokens=NUM_TOKENS)
    layers = store.manifest.num_moe_layers
    most = max(lead for lead in leads if lead is not None)
    assert layers < most <= 3 * layers, "the last layer of the token after the next at most"
    assert watched.page()("shadow_realign_total") == sum(1 for _ in watched.said(Rollback, to="server"))


def test_who_dies_and_who_returns(watched: Watched) -> None:
    before = watched.page()
    watched.cluster.kill("b")
    watched.cluster.await_members("a", "c", "d", "predictor")
    gone = watched.page()
    assert (gone("node_up", node="b"), gone("node_up", node="a")) == (0, 1)
    assert gone("cluster_epoch") == before("cluster_epoch") + 1
    assert gone("expert_loads_total", node="b") == before("expert_loads_total", node="b"), "counters never go back"
    watched.cluster.revive("b", predictor=True)
    watched.cluster.await_members(*NODES, "predictor")
    back = watched.page()
    assert (back("node_up", node="b"), back("node_rejoins_total")) == (1, 1)
    assert back("expert_loads_total", node="b") == 0, "it is another process"


def test_messages_that_are_not_accepted_are_counted_where_they_came_from(watched: Watched) -> None:
    link = watched.cluster.driver.link
    for _ in range(3):
        watched.cluster.network.send(link, "a", Rollback(sequence=1, position=1), [b"no", b"message"])
    page = watched.page()
    assert page("node_protocol_errors_total", node="a") == 3
    assert page("node_protocol_errors_total", node="b") == 0
    agent_link = watched.cluster.agents["c"]._server.link
    watched.cluster.network.send(agent_link, "server", Rollback(sequence=1, position=1), [b"none"])
    page = watched.page()
    assert page("protocol_errors_total") == 1
    assert page("node_bad_messages_total", node="c") == 1
    assert page("node_bad_messages_total", node="a") == 0
