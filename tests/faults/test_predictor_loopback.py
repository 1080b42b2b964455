"""A predictor that is wrong, late, dead or back again changes the time an answer takes and never the answer.

One thread, virtual time, no sleep.
"""

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
import torch

from odmoe_model.store import ExpertStore
from odmoe_server.engine.align import Periods
from odmoe_server.engine.build import EngineOptions
from odmoe_server.engine_api import ExpertStats
from odmoe_wire.codec import Blob
from odmoe_wire.link import Link
from odmoe_wire.messages import AnyMessage, Schedule
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


def ready_cluster(
    store: ExpertStore, *, periods: Periods | None = None, slots: int = 1, **predictor: Any
) -> LoopbackCluster:
    cluster = LoopbackCluster(store, options=EngineOptions(endpoint="inproc://unused", periods=periods or Periods()))
    cluster.add_predictor(**predictor)
    for peer_id in NODES:
        cluster.add_node(peer_id, slots=slots, predictor=True)
    cluster.await_members(*NODES, "predictor")
    cluster.settle(seconds=1.0)  # views and hellos between predictor and nodes
    return cluster


def recall(cluster: LoopbackCluster, stats: ExpertStats) -> float:
    return (stats.predicted + cluster.state.dispatch.predicted_late_total) / stats.activations


class Scrambling:
    """A link that turns every forecast into another, plausible one."""

    def __init__(self, link: Link, *, num_experts: int) -> None:
        self._link = link
        self._num_experts = num_experts
        self.scrambled = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._link, name)

    def send(self, peer: str, message: AnyMessage, *, epoch: int, blobs: Sequence[Blob] = ()) -> None:
        if isinstance(message, Schedule):
            self.scrambled += 1
            wrong = sorted((expert + 3) % self._num_experts for expert in message.experts)
            message = msgspec.structs.replace(message, experts=wrong)
        self._link.send(peer, message, epoch=epoch, blobs=blobs)


def test_right_forecasts_are_found_in_the_slots(store_and_expected: tuple[ExpertStore, list[int]]) -> None:
    store, expected = store_and_expected
    cluster = ready_cluster(store)
    tokens, stats = cluster.generate(PROMPT, max_tokens=NUM_TOKENS)
    assert tokens == expected
    # The shadow departs with the sampled token, so the first layer's gate speaks before it ("late departure").
    assert cluster.state.dispatch.predicted_late_total > 0
    assert recall(cluster, stats) > 0.9, "int8, aligned every step"
    # A forecast expert is in its slot or on its way there; with the clock standing still, it is there.
    assert stats.hit >= stats.predicted
    assert stats.missed <= stats.activations - stats.predicted
    cluster.assert_nothing_held()


def test_scrambled_forecasts(store_and_expected: tuple[ExpertStore, list[int]]) -> None:
    store, expected = store_and_expected
    links: list[Scrambling] = []

    def scramble(link: Link) -> Link:
        links.append(Scrambling(link, num_experts=store.manifest.num_experts))
        return links[-1]

    cluster = ready_cluster(store, wrap=scramble)
    tokens, stats = cluster.generate(PROMPT, max_tokens=NUM_TOKENS)
    assert tokens == expected
    assert all(link.scrambled for link in links)
    assert stats.missed > stats.hit
    assert sum(agent.report().loads_unused_total for agent in cluster.agents.values()) > 0
    cluster.assert_nothing_held()


def test_forecasts_that_come_too_late(store_and_expected: tuple[ExpertStore, list[int]]) -> None:
    store, expected = store_and_expected
    cluster = ready_cluster(store)
    for node_id in NODES:
        cluster.network.link_fault("predictor", node_id, delay_s=0.8)
    tokens, _ = cluster.generate(PROMPT, max_tokens=NUM_TOKENS)
    assert tokens == expected
    cluster.assert_nothing_held()


def test_the_predictor_dies_in_mid_answer_and_returns(store_and_expected: tuple[ExpertStore, list[int]]) -> None:
    store, expected = store_and_expected
    cluster = ready_cluster(store)
    predicted: dict[int, int] = {}

    def away_and_back(count: int) -> None:
        predicted[count] = cluster._loaded.total.predicted
        if count == 6:
            cluster.kill_predictor()
            cluster.await_members(*NODES)
        if count == 12:
            cluster.revive_predictor()
            cluster.await_members(*NODES, "predictor")
            cluster.settle(seconds=1.0)

    tokens, _ = cluster.generate(PROMPT, max_tokens=NUM_TOKENS, on_token=away_and_back)
    assert tokens == expected
    assert predicted[6] > predicted[2], "it forecast before it died"
    assert predicted[12] == predicted[7], "it did not while it was away"
    assert predicted[NUM_TOKENS] > predicted[13], "and does again, brought in line with the whole sequence"
    cluster.assert_nothing_held()


def test_alignments_lost_on_the_way(store_and_expected: tuple[ExpertStore, list[int]]) -> None:
    store, expected = store_and_expected
    cluster = ready_cluster(store)
    seen = 0

    def every_fourth(message: object) -> bool:
        nonlocal seen
        seen += 1
        return type(message).__name__ == "Align" and seen % 4 == 0

    cluster.network.link_fault("server", "predictor", drop=every_fourth)
    tokens, _ = cluster.generate(PROMPT, max_tokens=NUM_TOKENS)
    assert tokens == expected
    cluster.assert_nothing_held()


def test_two_sequences_one_after_the_other_do_not_mix(store_and_expected: tuple[ExpertStore, list[int]]) -> None:
    store, expected = store_and_expected
    cluster = ready_cluster(store)
    other, _ = cluster.generate([1, 2, 3], max_tokens=NUM_TOKENS)
    cluster.state.dispatch.predicted_late_total = 0
    tokens, stats = cluster.generate(PROMPT, max_tokens=NUM_TOKENS)
    assert tokens == expected
    assert tokens != other
    assert recall(cluster, stats) > 0.9
    cluster.assert_nothing_held()


@pytest.mark.parametrize("run_ahead", [1, 3])
def test_a_shadow_that_runs_ahead_forecasts_the_first_layers_in_time(
    store_and_expected: tuple[ExpertStore, list[int]], run_ahead: int
) -> None:
    store, expected = store_and_expected
    late: list[int] = []
    in_time: list[int] = []
    for depth in (0, run_ahead):
        cluster = ready_cluster(store, run_ahead=depth)
        tokens, stats = cluster.generate(PROMPT, max_tokens=NUM_TOKENS)
        assert tokens == expected
        assert recall(cluster, stats) > 0.9
        late.append(cluster.state.dispatch.predicted_late_total)
        in_time.append(stats.predicted)
        cluster.assert_nothing_held()
    assert late[1] < late[0]
    assert in_time[1] > in_time[0]


class Guessing:
    """A predictor's output head that is always wrong."""

    def __init__(self, head: torch.nn.Module) -> None:
        self._head = head

    def __call__(self, hidden_H: torch.Tensor) -> torch.Tensor:
        return -self._head(hidden_H)


@pytest.mark.parametrize("slots", [1, 4])
def test_a_shadow_that_runs_ahead_on_wrong_tokens_rolls_back(
    store_and_expected: tuple[ExpertStore, list[int]], slots: int
) -> None:
    store, expected = store_and_expected
    cluster = ready_cluster(store, run_ahead=2, slots=slots)
    worker = cluster.predictor.worker
    worker._shadow._head = Guessing(worker._shadow._head)  # type: ignore[assignment]
    tokens, stats = cluster.generate(PROMPT, max_tokens=NUM_TOKENS)
    assert tokens == expected
    assert worker.counters.undone > NUM_TOKENS // 2
    voided = cluster.predictor.switchboard.counters.rollbacks
    assert voided == worker.counters.undone * (len(NODES) + 1), "each wrong guess, to every node and the server"
    assert worker.counters.known == 0
    assert recall(cluster, stats) > 0.9, "each position was forecast again with its own token"
    cluster.assert_nothing_held()


@pytest.mark.parametrize(
    ("periods", "run_ahead"),
    [
        (Periods(token=2, kv=4), 0),
        (Periods(token=4, kv=2), 1),
        (Periods(token=1, kv=None), 2),
        (Periods(token=None, kv=1), 0),
        (Periods(token=None, kv=None), 0),
        (Periods(token=None, kv=None), 3),
    ],
)
def test_alignment_periods_change_recall_and_never_the_answer(
    store_and_expected: tuple[ExpertStore, list[int]], periods: Periods, run_ahead: int
) -> None:
    store, expected = store_and_expected
    cluster = ready_cluster(store, periods=periods, run_ahead=run_ahead)
    tokens, stats = cluster.generate(PROMPT, max_tokens=NUM_TOKENS)
    assert tokens == expected
    cluster.assert_nothing_held()
    counters = cluster.predictor.worker.counters
    assert (counters.failed, counters.skipped, counters.abandoned) == (0, 0, 0)
    assert counters.forecast + counters.known == NUM_TOKENS - 1, "each position was forecast, with whatever token"
    assert 0.3 < recall(cluster, stats) <= 1.0


def test_a_lineage_of_its_own_drifts(store_and_expected: tuple[ExpertStore, list[int]]) -> None:
    """A shadow that goes on with wrong tokens is worth less than an aligned one; each alignment mends it."""
    store, _ = store_and_expected
    recalls = []
    for period in (1, 2, None):
        cluster = ready_cluster(store, periods=Periods(token=period, kv=period))
        shadow = cluster.predictor.worker._shadow
        shadow._head = Guessing(shadow._head)  # type: ignore[assignment]
        _, stats = cluster.generate(PROMPT, max_tokens=NUM_TOKENS)
        recalls.append(recall(cluster, stats))
    assert recalls[0] > recalls[1] > recalls[2]


@pytest.mark.parametrize("dropped", ["Align", "Schedule"])
def test_running_ahead_while_messages_are_lost(store_and_expected: tuple[ExpertStore, list[int]], dropped: str) -> None:
    store, expected = store_and_expected
    cluster = ready_cluster(store, run_ahead=2)
    seen = 0

    def every_third(message: object) -> bool:
        nonlocal seen
        seen += 1
        return type(message).__name__ == dropped and seen % 3 == 0

    for sender, receiver in (("server", "predictor"), ("predictor", "server"), ("predictor", "a")):
        cluster.network.link_fault(sender, receiver, drop=every_third)
    tokens, _ = cluster.generate(PROMPT, max_tokens=NUM_TOKENS)
    assert tokens == expected
    cluster.assert_nothing_held()


def test_a_predictor_ahead_of_the_server_dies_and_returns(store_and_expected: tuple[ExpertStore, list[int]]) -> None:
    store, expected = store_and_expected
    cluster = ready_cluster(store, run_ahead=1)

    def away_and_back(count: int) -> None:
        if count == 6:
            cluster.kill_predictor()
            cluster.await_members(*NODES)
        if count == 12:
            cluster.revive_predictor()
            cluster.await_members(*NODES, "predictor")

    tokens, _ = cluster.generate(PROMPT, max_tokens=NUM_TOKENS, on_token=away_and_back)
    assert tokens == expected
    cluster.assert_nothing_held()
