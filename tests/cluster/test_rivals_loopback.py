"""Every rival in the shadow's place in a whole cluster: the same answer as transformers', and forecasts that count."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from torch import Tensor

from odmoe_model.store import ExpertStore
from odmoe_predictor.config import RivalKind
from odmoe_predictor.rival_worker import RivalWorker
from odmoe_predictor.rivals import weights
from odmoe_predictor.rivals.base import Forecasts, Rival, Shape
from odmoe_predictor.rivals.build import make_rival
from odmoe_predictor.rivals.trained import ExpertScores
from odmoe_predictor.switchboard import REBIRTH_EVERY_S
from odmoe_server.engine.build import EngineOptions
from odmoe_server.engine_api import ExpertStats
from odmoe_wire.messages import Align, Routed, Schedule
from support.loopback_cluster import LoopbackCluster
from support.reference import reference_tokens
from support.stores import tiny_store

PROMPT = [3, 5, 7, 11, 13]
NUM_TOKENS = 24
NODES = ("a", "b", "c", "d")


@pytest.fixture(scope="module")
def store_and_expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[ExpertStore, list[int]]:
    directory = tmp_path_factory.mktemp("mixtral")
    store = ExpertStore.open(tiny_store("mixtral", directory), verify=False)
    return store, reference_tokens(directory / "checkpoint", PROMPT, NUM_TOKENS)


@pytest.fixture
def make(store_and_expected: tuple[ExpertStore, list[int]], tmp_path: Path) -> Callable[..., Rival]:
    """Any rival of the store, the trained one with weights as they fell."""
    store, _ = store_and_expected

    def make_one(kind: RivalKind, **options: Any) -> Rival:
        if kind == "trained":
            options["weights"] = tmp_path / "w"
            model = ExpertScores(Shape.of(store.manifest), look_ahead=1, width=8)
            weights.save(model, options["weights"], store_digest=store.manifest.digest)
        return make_rival(kind, store, **options)

    return make_one


def ready_cluster(store: ExpertStore, rival: Rival, **options: Any) -> LoopbackCluster:
    cluster = LoopbackCluster(store, options=EngineOptions(endpoint="inproc://unused", **options))
    cluster.add_predictor(rival=rival)
    for peer_id in NODES:
        cluster.add_node(peer_id, predictor=True)
    cluster.await_members(*NODES, "predictor")
    cluster.settle(seconds=1.0)
    return cluster


def recall(cluster: LoopbackCluster, stats: ExpertStats) -> float:
    return (stats.predicted + cluster.state.dispatch.predicted_late_total) / stats.activations


def worker_of(cluster: LoopbackCluster) -> RivalWorker:
    worker = cluster.predictor.worker
    assert isinstance(worker, RivalWorker)
    return worker


def sent(cluster: LoopbackCluster, kind: type[Any], *, to: str = "predictor") -> list[Any]:
    return [item.message for item in cluster.network.story if item.target == to and isinstance(item.message, kind)]


@pytest.mark.parametrize("kind", get_args(RivalKind))
def test_the_answer_is_the_same_and_forecasts_count(
    store_and_expected: tuple[ExpertStore, list[int]], make: Callable[..., Rival], kind: RivalKind
) -> None:
    store, expected = store_and_expected
    cluster = ready_cluster(store, make(kind))
    tokens, stats = cluster.generate(PROMPT, max_tokens=NUM_TOKENS)
    assert tokens == expected
    assert recall(cluster, stats) > 0.1
    assert stats.predicted > 0, "some came before the gate had spoken"
    counters = worker_of(cluster).counters
    assert (counters.forecast, counters.failed) == (NUM_TOKENS - 1, 0), "every decode step, and no prompt"
    assert cluster.predictor.switchboard.counters.rollbacks == 0
    cluster.assert_nothing_held()


def test_forecasts_are_what_the_rival_says(store_and_expected: tuple[ExpertStore, list[int]]) -> None:
    """Knowing everything beforehand is possible here: the same request again."""
    store, expected = store_and_expected

    class Oracle:
        """Repeats, token by token, what was routed the first time."""

        wants = "routings"
        held_bytes = 0

        def __init__(self) -> None:
            self.seen: list[dict[int, list[int]]] = []
            self.replay: list[dict[int, list[int]]] = []

        def begin(self, sequence: int) -> None:
            self.replay, self.seen = self.seen, []

        def end(self, sequence: int) -> None:
            pass

        def on_token(self, sequence: int) -> dict[int, list[int]]:
            self.seen.append({})
            return self.replay[len(self.seen) - 1] if self.replay else {}

        def on_routed(self, sequence: int, layer: int, experts: list[int], x_TH: object) -> dict[int, list[int]]:
            assert x_TH is None
            self.seen[-1][layer] = experts
            return {}

    cluster = ready_cluster(store, Oracle())  # type: ignore[arg-type]
    _, blind = cluster.generate(PROMPT, max_tokens=NUM_TOKENS)
    assert recall(cluster, blind) == 0
    tokens, stats = cluster.generate(PROMPT, max_tokens=NUM_TOKENS)
    assert tokens == expected
    assert recall(cluster, stats) == 1.0


@pytest.mark.parametrize(("kind", "inputs"), [("previous", False), ("gate", True)])
def test_the_server_tells_what_is_wanted_and_no_cache(
    store_and_expected: tuple[ExpertStore, list[int]],
    make: Callable[..., Rival],
    kind: RivalKind,
    inputs: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, _ = store_and_expected
    seen: list[bool] = []
    rival = make(kind)
    on_routed = rival.on_routed

    def watched(sequence: int, layer: int, experts: list[int], x_TH: Tensor | None) -> Forecasts:
        seen.append(x_TH is not None)
        return on_routed(sequence, layer, experts, x_TH)

    monkeypatch.setattr(rival, "on_routed", watched)
    cluster = ready_cluster(store, rival)
    cluster.generate(PROMPT, max_tokens=4)
    aligns = sent(cluster, Align)
    assert [(align.position, len(align.tokens), align.cache) for align in aligns] == [(at, 1, []) for at in (5, 6, 7)]
    layers = range(store.manifest.num_moe_layers)
    routed = [(each.span.position, each.layer) for each in sent(cluster, Routed)]
    assert routed == [(at, layer) for at in (5, 6, 7) for layer in layers]
    assert seen == [inputs] * len(routed)


@pytest.mark.parametrize("look_ahead", [1, 2])
def test_gates_forecast_so_many_layers_ahead_in_time(
    store_and_expected: tuple[ExpertStore, list[int]], make: Callable[..., Rival], look_ahead: int
) -> None:
    store, expected = store_and_expected
    cluster = ready_cluster(store, make("gate", look_ahead=look_ahead))
    tokens, stats = cluster.generate(PROMPT, max_tokens=NUM_TOKENS)
    assert tokens == expected
    assert cluster.state.dispatch.predicted_late_total == 0
    forecast = [schedule.layer for schedule in sent(cluster, Schedule, to="server")]
    assert forecast == [*range(look_ahead, store.manifest.num_moe_layers)] * (NUM_TOKENS - 1)
    assert stats.predicted > 0


@pytest.mark.parametrize("dropped", ["Align", "Routed", "Start"])
def test_messages_lost_on_the_way_cost_forecasts_only(
    store_and_expected: tuple[ExpertStore, list[int]], make: Callable[..., Rival], dropped: str
) -> None:
    store, expected = store_and_expected
    cluster = ready_cluster(store, make("trained"))
    seen = 0

    def now_and_then(message: object) -> bool:
        nonlocal seen
        seen += type(message).__name__ == dropped
        return type(message).__name__ == dropped and seen % 3 == 1

    cluster.network.link_fault("server", "predictor", drop=now_and_then)
    tokens, _ = cluster.generate(PROMPT, max_tokens=NUM_TOKENS)
    assert tokens == expected
    assert seen
    if dropped == "Start":
        assert worker_of(cluster).counters.failed == 1, "it says so once, and comes back as one who knows nothing"
        cluster.settle(seconds=REBIRTH_EVERY_S + 1.0)
        tokens, stats = cluster.generate(PROMPT, max_tokens=NUM_TOKENS)
        assert tokens == expected
        assert stats.predicted > 0
    cluster.assert_nothing_held()


def test_a_shadow_takes_a_rivals_place_amid_an_answer(
    store_and_expected: tuple[ExpertStore, list[int]], make: Callable[..., Rival]
) -> None:
    store, expected = store_and_expected
    cluster = ready_cluster(store, make("previous"))

    def replace(count: int) -> None:
        if count == 8:
            cluster.kill_predictor()
            cluster.await_members(*NODES)
            cluster.revive_predictor()
            cluster.await_members(*NODES, "predictor")
            cluster.settle(seconds=1.0)

    tokens, _ = cluster.generate(PROMPT, max_tokens=NUM_TOKENS, on_token=replace)
    assert tokens == expected
    counters = cluster.predictor.worker.counters
    assert (counters.failed, counters.forecast) == (0, NUM_TOKENS - 8)
    cluster.assert_nothing_held()
