"""Nodes that die, hang, lose messages or return in the midst of an answer: the tokens stay transformers' own.

One thread, virtual time, no sleep. Each test also ends with every slot free.
"""

import random
from itertools import pairwise
from pathlib import Path

import pytest

from odmoe_model.store import ExpertStore
from odmoe_server.cluster.calls import CallError
from odmoe_server.cluster.timeline import Timeline, Told
from odmoe_wire.messages import Compute, Load, Result, Withdraw
from support.loopback_cluster import LoopbackCluster
from support.reference import reference_tokens
from support.stores import tiny_store

PROMPT = [3, 5, 7, 11, 13]
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def store_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mixtral")


@pytest.fixture(scope="module")
def store_and_expected(store_directory: Path) -> tuple[ExpertStore, list[int]]:
    store = ExpertStore.open(tiny_store("mixtral", store_directory), verify=False)
    return store, reference_tokens(store_directory / "checkpoint", PROMPT, NUM_TOKENS)


@pytest.fixture
def cluster(store_and_expected: tuple[ExpertStore, list[int]]) -> LoopbackCluster:
    cluster = LoopbackCluster(store_and_expected[0])
    for peer_id in ("a", "b", "c"):
        cluster.add_node(peer_id)
    cluster.await_members("a", "b", "c")
    return cluster


@pytest.fixture
def expected(store_and_expected: tuple[ExpertStore, list[int]]) -> list[int]:
    return store_and_expected[1]


def test_nothing_wrong(cluster: LoopbackCluster, expected: list[int]) -> None:
    tokens, stats = cluster.generate(PROMPT, max_tokens=NUM_TOKENS)
    assert tokens == expected
    assert stats.activations == stats.hit + stats.late + stats.missed > 0
    cluster.assert_nothing_held()


def test_a_node_killed_between_tokens(cluster: LoopbackCluster, expected: list[int]) -> None:
    tokens, _ = cluster.generate(
        PROMPT, max_tokens=NUM_TOKENS, on_token=lambda count: cluster.kill("a") if count == 7 else None
    )
    assert tokens == expected
    assert "a" not in cluster.state.peers.admitted
    cluster.assert_nothing_held()


@pytest.mark.parametrize("victim", ["a", "b", "c"])
def test_a_node_killed_with_a_compute_in_hand(cluster: LoopbackCluster, expected: list[int], victim: str) -> None:
    def kill_when_busy() -> None:
        busy = any(request.peer_id == victim for request in cluster.state.dispatch.requests.values())
        if victim in cluster.roles and cluster.state.dispatch._last_request_id > 40 and busy:
            cluster.kill(victim)

    cluster.each_turn(kill_when_busy)
    tokens, _ = cluster.generate(PROMPT, max_tokens=NUM_TOKENS)
    assert tokens == expected
    assert victim not in cluster.roles, "the fault must have happened"
    cluster.assert_nothing_held()


def test_a_node_that_hangs_with_its_connection_open(cluster: LoopbackCluster, expected: list[int]) -> None:
    def hang(count: int) -> None:
        if count == 5:
            cluster.roles["b"].paused = True

    tokens, _ = cluster.generate(PROMPT, max_tokens=NUM_TOKENS, on_token=hang)
    assert tokens == expected, "others have its work before it is given up"
    cluster.settle(seconds=cluster.state.config.lost_after_s)
    assert "b" not in cluster.state.peers.admitted
    cluster.roles["b"].paused = False
    cluster.await_members("a", "b", "c")
    assert cluster.state.peers.rejoins_total == 1
    cluster.assert_nothing_held()


def test_a_slow_link_costs_time_and_nothing_else(cluster: LoopbackCluster, expected: list[int]) -> None:
    cluster.network.link_fault("a", "server", delay_s=0.3)
    tokens, _ = cluster.generate(PROMPT, max_tokens=NUM_TOKENS)
    assert tokens == expected
    assert cluster.state.dispatch.failovers_total == 0
    cluster.assert_nothing_held()


def test_a_link_too_slow_for_the_deadline_is_hedged(cluster: LoopbackCluster, expected: list[int]) -> None:
    late_s = cluster.state.config.compute_floor_s + 0.5
    cluster.network.link_fault("a", "server", delay_s=late_s)
    cluster.settle(seconds=4.0)  # its life signs are late as well, but they come
    cluster.await_members("a", "b", "c")
    tokens, _ = cluster.generate(PROMPT, max_tokens=NUM_TOKENS)
    assert tokens == expected
    assert cluster.state.dispatch.failovers_total > 0
    cluster.network.heal("a", "server")
    cluster.settle(seconds=4.0)
    assert cluster.state.dispatch.duplicates_total > 0
    cluster.assert_nothing_held()


def test_who_was_late_is_told_that_its_answer_is_not_needed(cluster: LoopbackCluster, expected: list[int]) -> None:
    told: list[Told] = []
    cluster.driver.timeline = Timeline(lambda mark: told.append(mark) if isinstance(mark, Told) else None, lambda: 0.0)

    def stand_still(count: int) -> None:
        cluster.roles["a"].paused = count >= 7

    tokens, _ = cluster.generate(PROMPT, max_tokens=NUM_TOKENS, on_token=stand_still)
    assert tokens == expected
    asked = {each.message.request_id for each in told if each.peer_id == "a" and isinstance(each.message, Compute)}
    spared = [each.message.request_id for each in told if isinstance(each.message, Withdraw)]
    assert spared, "another node was first with it"
    assert asked.issuperset(spared)
    assert {each.peer_id for each in told if isinstance(each.message, Withdraw)} == {"a"}
    cluster.roles["a"].paused = False
    cluster.assert_nothing_held()


@pytest.mark.parametrize(
    ("source", "target", "kind"), [("server", "a", Compute), ("a", "server", Result)], ids=["compute", "result"]
)
def test_lost_messages_are_asked_for_again(
    cluster: LoopbackCluster, expected: list[int], source: str, target: str, kind: type
) -> None:
    seen = 0

    def every_third(message: object) -> bool:
        nonlocal seen
        seen += isinstance(message, kind)
        return isinstance(message, kind) and seen % 3 == 0

    cluster.network.link_fault(source, target, drop=every_third)
    tokens, _ = cluster.generate(PROMPT, max_tokens=NUM_TOKENS)
    assert tokens == expected
    assert cluster.state.dispatch.failovers_total > 0
    cluster.assert_nothing_held()


def test_a_link_that_loses_half_costs_short_waits(cluster: LoopbackCluster, expected: list[int]) -> None:
    cluster.generate(PROMPT, max_tokens=4)  # until it is known how soon answers come
    dice = random.Random(1)
    cluster.network.link_fault("a", "server", drop=lambda _: dice.random() < 0.5)
    cluster.network.link_fault("server", "a", drop=lambda _: dice.random() < 0.5)
    came_s = [cluster.network.clock()]
    tokens, _ = cluster.generate(
        PROMPT, max_tokens=NUM_TOKENS, on_token=lambda _: came_s.append(cluster.network.clock())
    )
    assert tokens == expected
    longest_s = max(after_s - before_s for before_s, after_s in pairwise(came_s))
    assert 0.0 < longest_s < cluster.state.config.compute_floor_s, "once for all layers, and not for long"


def test_every_message_twice(cluster: LoopbackCluster, expected: list[int]) -> None:
    for node in ("a", "b", "c"):
        cluster.network.link_fault("server", node, duplicate=lambda _message: True)
        cluster.network.link_fault(node, "server", duplicate=lambda _message: True)
    tokens, _ = cluster.generate(PROMPT, max_tokens=NUM_TOKENS)
    assert tokens == expected
    assert cluster.state.dispatch.duplicates_total > 0
    cluster.assert_nothing_held()


def test_a_node_restarts_and_takes_its_share_again(cluster: LoopbackCluster, expected: list[int]) -> None:
    def restart(count: int) -> None:
        if count == 4:
            cluster.kill("c")
        if count == 10:
            cluster.revive("c")
            cluster.await_members("a", "b", "c")

    tokens, _ = cluster.generate(PROMPT, max_tokens=NUM_TOKENS, on_token=restart)
    assert tokens == expected
    assert cluster.agents["c"].report().loads_total > 0
    cluster.assert_nothing_held()


def test_all_nodes_gone_waits_for_one(cluster: LoopbackCluster, expected: list[int]) -> None:
    def away_and_back(count: int) -> None:
        if count == 4:
            for peer_id in ("a", "b", "c"):
                cluster.kill(peer_id)
            cluster.until(lambda: not cluster.state.peers.members())
            cluster.revive("b")

    tokens, _ = cluster.generate(PROMPT, max_tokens=NUM_TOKENS, on_token=away_and_back)
    assert tokens == expected
    cluster.assert_nothing_held()


def test_no_node_at_all_is_an_error_in_bounded_time(cluster: LoopbackCluster) -> None:
    for peer_id in ("a", "b", "c"):
        cluster.kill(peer_id)
    began_s = cluster.network.clock()
    with pytest.raises(CallError, match="no node agent"):
        cluster.generate(PROMPT, max_tokens=1)
    assert cluster.network.clock() - began_s <= cluster.state.config.call_timeout_s + 1.0
    assert not cluster.state.dispatch.calls


def test_a_long_prompt_loads_each_next_layer_ahead(cluster: LoopbackCluster, store_directory: Path) -> None:
    prompt = list(range(3, 43))
    tokens, _ = cluster.generate(prompt, max_tokens=4)
    assert tokens == reference_tokens(store_directory / "checkpoint", prompt, 4)
    ahead = [sent.message for sent in cluster.network.story if isinstance(sent.message, Load)]
    assert {message.layer for message in ahead} == {0, 1, 2}
    cluster.assert_nothing_held()
