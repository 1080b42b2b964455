"""Importance mode on a whole cluster: exact with alpha 0, and what it does to hits, loads and weights above it."""

from itertools import pairwise
from typing import Any

import pytest
import torch

from odmoe_model.store import ExpertStore
from odmoe_server.engine.build import EngineOptions
from odmoe_server.engine_api import ExpertStats
from odmoe_server.importance.history import Key
from odmoe_server.importance.mode import PATIENCE_S
from odmoe_server.importance.options import ImportanceOptions
from odmoe_wire.messages import Result
from support.loopback_cluster import LoopbackCluster
from support.reference import reference_tokens
from support.stores import tiny_store

PROMPT = [(5 * i * i + 3) % 127 + 1 for i in range(37)]
NUM_TOKENS = 12


@pytest.fixture(scope="module")
def store_and_expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[ExpertStore, list[int]]:
    """Three layers of eight experts, three a token."""
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("qwen3_moe")
    store = ExpertStore.open(tiny_store("qwen3_moe", directory), verify=False)
    return store, reference_tokens(directory / "checkpoint", PROMPT, NUM_TOKENS)


def ready_cluster(
    store: ExpertStore, *, slots: tuple[int, ...] = (4, 3), predictor: bool = False, draft: int = 0, **importance: Any
) -> LoopbackCluster:
    told = ImportanceOptions(**importance)
    options = EngineOptions(endpoint="inproc://unused", prefill_chunk=16, draft=draft, importance=told)
    cluster = LoopbackCluster(store, options=options)
    members = [f"n{number}" for number in range(len(slots))]
    if predictor:
        cluster.add_predictor(run_ahead=8 if draft else 0)
    for peer_id, num_slots in zip(members, slots, strict=True):
        cluster.add_node(peer_id, slots=num_slots, predictor=predictor)
    cluster.await_members(*members, *(["predictor"] if predictor else []))
    cluster.settle(seconds=0.5)
    return cluster


def loads(cluster: LoopbackCluster) -> int:
    return sum(agent.state.counters.loads for agent in cluster.agents.values())


def assert_residency_is_true(cluster: LoopbackCluster) -> None:
    """What the server believes of the slots is what is in them, and no node waits for anything."""
    cluster.settle(seconds=1.0)
    for peer_id, agent in cluster.agents.items():
        agent.state.check_integrity()
        assert cluster.state.residency.on(peer_id) == {Key(*ref) for ref in _pairs(agent)}
        assert (agent.state.num_requests, agent.state.num_wants) == (0, 0)


def _pairs(agent: Any) -> list[tuple[int, int]]:
    return [(ref.layer, ref.expert) for ref in agent.state.held()]


EXACT: dict[str, dict[str, Any]] = {
    **{policy: {"eviction": policy} for policy in ("score", "lru", "lfu")},
    "no prefetch": {"prefetch": "off"},
    "the host's share": {"cpu_share": True},
    "with a predictor": {"predictor": True},
    "with drafts": {"predictor": True, "draft": 3},
    "by the forecast": {"predictor": True, "eviction": "forecast"},
    "fetched by the gate": {"predictor": True, "prefetch": "gate"},
    "one slot a node": {"slots": (1, 1)},
    "slots for all": {"slots": (12, 12)},
    "nothing may be replaced": {"alpha": 0.9, "max_weight": 0.0},
    "the operator forbids it": {"alpha": 0.9, "max_alpha": 0.0},
}


@pytest.mark.parametrize("name", EXACT)
def test_without_substitution_the_answer_is_transformers_own(
    store_and_expected: tuple[ExpertStore, list[int]], name: str
) -> None:
    store, expected = store_and_expected
    cluster = ready_cluster(store, **{"alpha": 0.0, **EXACT[name]})
    tokens, stats = cluster.generate(PROMPT, max_tokens=NUM_TOKENS)
    assert tokens == expected
    assert stats.substituted == cluster.total.substituted == 0
    assert_residency_is_true(cluster)


def test_sequences_decoded_together_are_exact_too(store_and_expected: tuple[ExpertStore, list[int]]) -> None:
    store, expected = store_and_expected
    cluster = ready_cluster(store, alpha=0.0)
    tokens, _ = cluster.generate_together([PROMPT, PROMPT[:9], PROMPT], max_tokens=NUM_TOKENS)
    assert tokens[0] == tokens[2] == expected
    assert_residency_is_true(cluster)


def test_substitution_turns_misses_into_hits(store_and_expected: tuple[ExpertStore, list[int]]) -> None:
    """The more, the larger alpha is; and the answer is no longer bound to be the same."""
    store, _ = store_and_expected
    shares, hits = [], []
    for alpha in (0.0, 0.2, 0.6):
        cluster = ready_cluster(store, alpha=alpha, prefetch="off", slots=(6, 6))
        tokens, stats = cluster.generate(PROMPT, max_tokens=NUM_TOKENS)
        assert len(tokens) == NUM_TOKENS
        shares.append(stats.substituted / stats.activations)
        hits.append(stats.hit / stats.activations)
        by_layer = [layer.substituted for layer in cluster.state.ledger.outcomes()]
        assert stats.substituted == cluster.total.substituted == sum(by_layer)
        assert_residency_is_true(cluster)
    assert shares[0] == 0 < shares[1] < shares[2]
    assert hits[0] < hits[2] - 0.1


def test_hits_grow_with_alpha_where_the_next_gates_choice_is_fetched(
    store_and_expected: tuple[ExpertStore, list[int]],
) -> None:
    """With few slots they fell: what no longer had to run was not fetched, though nothing could stand in for it."""
    store, _ = store_and_expected
    shares = []
    for alpha in (0.0, 0.2, 0.6):
        cluster = ready_cluster(store, alpha=alpha, prefetch="gate", slots=(4,))
        _, stats = cluster.generate(PROMPT, max_tokens=NUM_TOKENS)
        shares.append((stats.hit + stats.late) / stats.activations)
        assert_residency_is_true(cluster)
    assert shares[0] < shares[1] < shares[2], shares


@pytest.mark.parametrize("prefetch", ["auto", "shadow"])
def test_the_shadows_forecast_is_fetched_layers_ahead(
    store_and_expected: tuple[ExpertStore, list[int]], prefetch: str
) -> None:
    store, expected = store_and_expected
    found = {}
    for source in ("off", prefetch):
        cluster = ready_cluster(store, alpha=0.0, prefetch=source, slots=(6, 6), predictor=True)
        tokens, found[source] = cluster.generate(PROMPT, max_tokens=NUM_TOKENS)
        assert tokens == expected
        assert found[source].predicted > 0
        assert_residency_is_true(cluster)
    assert found[prefetch].missed < found["off"].missed


def test_a_prefetch_that_is_right_is_a_hit(store_and_expected: tuple[ExpertStore, list[int]]) -> None:
    store, _ = store_and_expected
    found = {}
    for prefetch in ("off", "gate"):
        cluster = ready_cluster(store, alpha=0.0, prefetch=prefetch, slots=(6, 6))
        _, found[prefetch] = cluster.generate(PROMPT, max_tokens=NUM_TOKENS)
    assert found["gate"].missed < found["off"].missed


def test_what_the_host_computes_is_not_loaded(store_and_expected: tuple[ExpertStore, list[int]]) -> None:
    store, expected = store_and_expected
    total = {}
    for cpu_share in (False, True):
        cluster = ready_cluster(store, alpha=0.0, prefetch="off", cpu_share=cpu_share, slots=(4,))
        tokens, stats = cluster.generate(PROMPT, max_tokens=NUM_TOKENS)
        assert tokens == expected
        total[cpu_share] = stats.hit + stats.late + stats.missed, stats.activations, loads(cluster)
    assert total[False][0] == total[False][1]
    assert total[True][0] < total[True][1] == total[False][1], "every expert is counted once"
    assert total[True][2] < total[False][2]


def test_what_a_late_node_has_is_replaced_where_the_client_allows_it(
    store_and_expected: tuple[ExpertStore, list[int]],
) -> None:
    """With alpha 1 no expert of this checkpoint must run, so nobody waits for the node."""
    store, expected = store_and_expected
    exact, exact_stall_s, _ = _with_a_late_node(store, alpha=0.0)
    _, stall_s, stats = _with_a_late_node(store, alpha=1.0)
    assert exact == expected
    assert stats.substituted > 0
    assert PATIENCE_S <= stall_s < exact_stall_s / 2


def _with_a_late_node(store: ExpertStore, *, alpha: float) -> tuple[list[int], float, ExpertStats]:
    """Tokens, the longest time from one to the next, and statistics, where one of two nodes lives on but gives no
    answer any more."""
    cluster = ready_cluster(store, alpha=alpha, slots=(12, 12))
    times_s: list[float] = []

    def on_token(count: int) -> None:
        times_s.append(cluster.network.clock())
        if count == 3:
            cluster.network.link_fault("n1", "server", drop=lambda message: isinstance(message, Result))

    tokens, stats = cluster.generate(PROMPT, max_tokens=NUM_TOKENS, on_token=on_token)
    return tokens, max(later - earlier for earlier, later in pairwise(times_s)), stats


def test_a_node_that_dies_takes_its_experts_with_it(store_and_expected: tuple[ExpertStore, list[int]]) -> None:
    store, expected = store_and_expected
    cluster = ready_cluster(store, alpha=0.0, slots=(3, 3, 3))
    tokens, _ = cluster.generate(
        PROMPT, max_tokens=NUM_TOKENS, on_token=lambda count: cluster.kill("n1") if count == 4 else None
    )
    assert tokens == expected
    assert cluster.state.residency.on("n1") == frozenset()
    assert set(cluster.state.residency.holders(0).values()) <= {"n0", "n2"}
    assert_residency_is_true(cluster)
