"""Nodes of unlike speed and room, groups that do not divide, dense layers first: tokens stay transformers' own, and
what the predictor had loaded is where the server asks for it.

One thread, virtual time, no sleep.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from odmoe_model.quantize import HalfWeight
from odmoe_model.store import ExpertStore
from odmoe_server.engine.build import EngineOptions
from odmoe_wire.placement import group_of, groups
from support.loopback_cluster import LoopbackCluster
from support.reference import reference_tokens
from support.stores import tiny_store
from support.virtual_lane import VirtualLane

PROMPT = [3, 5, 7, 11, 13]
NUM_TOKENS = 16


@dataclass(frozen=True)
class Case:
    """`nodes`: slots, and microseconds a load takes."""

    family: str
    nodes: Mapping[str, tuple[int, int]]
    group_sizes: list[int]
    group_size: int | None = None
    shape: dict[str, Any] = field(default_factory=dict)
    moe_layers: int = 5


FIVE = {"num_hidden_layers": 5}
CASES = {
    "three nodes in groups of two": Case(
        "mixtral", {"a": (1, 2000), "b": (3, 1000), "c": (2, 1000)}, group_sizes=[3], shape=FIVE
    ),
    "five nodes, top-4": Case(
        "mixtral",
        {"a": (1, 1000), "b": (2, 2500), "c": (1, 1000), "d": (4, 0), "e": (1, 2500)},
        group_sizes=[5],
        shape={**FIVE, "num_experts_per_tok": 4},
    ),
    "seven nodes in groups of two": Case(
        "mixtral",
        {"a": (1, 900), "b": (1, 300), "c": (2, 900), "d": (1, 300), "e": (1, 900), "f": (3, 300), "g": (1, 900)},
        group_sizes=[3, 2, 2],
        shape=FIVE,
    ),
    "groups larger than there are nodes": Case(
        "mixtral", {"a": (2, 1000), "b": (4, 3000)}, group_sizes=[2], group_size=6, shape=FIVE
    ),
    "groups smaller than top-k": Case(
        "mixtral", {"a": (2, 1000), "b": (2, 3000), "c": (2, 5000)}, group_sizes=[1, 1, 1], group_size=1, shape=FIVE
    ),
    "one node": Case("mixtral", {"a": (2, 1000)}, group_sizes=[1], shape=FIVE),
    "dense layers first, DeepSeek": Case(
        "deepseek_v3",
        {"a": (2, 1000), "b": (2, 2000), "c": (2, 4000)},
        group_sizes=[1, 1, 1],
        group_size=1,
        shape={**FIVE, "first_k_dense_replace": 2},
        moe_layers=3,
    ),
    "dense layers first, GLM-4": Case(
        "glm4_moe",
        {"a": (1, 1000), "b": (1, 2000), "c": (1, 1000), "d": (1, 2000)},
        group_sizes=[2, 2],
        shape={**FIVE, "first_k_dense_replace": 1},
        moe_layers=4,
    ),
    "every other layer dense": Case(
        "qwen2_moe",
        {"a": (1, 1000), "b": (1, 2000), "c": (1, 1000), "d": (1, 2000)},
        group_sizes=[2, 2],
        shape={**FIVE, "mlp_only_layers": [0, 2]},
        moe_layers=3,
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_tokens_are_transformers_own_and_forecasts_are_found_where_they_were_sent(case: Case, tmp_path: Path) -> None:
    store = ExpertStore.open(tiny_store(case.family, tmp_path, **case.shape), verify=False)
    assert store.manifest.num_moe_layers == case.moe_layers
    cluster = LoopbackCluster(store, options=EngineOptions(endpoint="inproc://unused", group_size=case.group_size))
    cluster.add_predictor(run_ahead=1)
    for node_id, (slots, load_us) in case.nodes.items():
        cluster.add_node(node_id, slots=slots, predictor=True, load_us=load_us)
    cluster.await_members(*case.nodes, "predictor")
    cluster.settle(seconds=1.0)  # views and hellos between predictor and nodes
    members, group_size = cluster.state.peers.members(), cluster.state.config.group_size
    assert [len(group) for group in groups(members, group_size)] == case.group_sizes
    asked: set[tuple[int, str]] = set()

    def watch() -> None:
        for request in cluster.state.dispatch.requests.values():
            call = cluster.state.dispatch.calls[request.call_id]
            if call.predicted:
                asked.add((call.call.layer, request.peer_id))

    cluster.each_turn(watch)
    tokens, stats = cluster.generate(PROMPT, max_tokens=NUM_TOKENS)
    assert tokens == reference_tokens(tmp_path / "checkpoint", PROMPT, NUM_TOKENS)
    # Each layer that was forecast was computed by its group: by the ordinal of those that have experts.
    assert {layer for layer, _ in asked} == set(range(case.moe_layers))
    for layer, node_id in asked:
        assert node_id in {member.node_id for member in group_of(layer, members, group_size, case.moe_layers)}
    # With the clock standing still, a forecast expert is in its slot if it was sent to the node that is asked for it.
    assert stats.predicted > stats.activations / 2
    assert stats.hit >= stats.predicted
    cluster.assert_nothing_held()


# Virtual seconds of a load; every other node has half the link.
FAST_S, SLOW_S = 0.05, 0.1


def token_s(store: ExpertStore, *, told: bool, first: int = 4, last: int = 14) -> float:
    """Virtual seconds a token takes on eight nodes in groups of two, where nothing but loads takes any; `told`: the
    server knows of their speed."""
    cluster = LoopbackCluster(store)
    cluster.add_predictor(run_ahead=2, quantize=HalfWeight)
    lanes = []
    for number in range(8):
        load_s = FAST_S if number % 2 == 0 else SLOW_S
        load_us = round(load_s * 1e6) if told else 0
        agent = cluster.add_node(f"n{number}", slots=2, predictor=True, load_us=load_us)
        lanes.append(VirtualLane(agent._inbox, load_s=load_s, clock=cluster.network.clock))
        agent._loads = lanes[-1]
        cluster.each_turn(lanes[-1].end_due)
    cluster.await_members(*cluster.agents, "predictor")
    cluster.settle(seconds=1.0)
    at_s: dict[int, float] = {}
    cluster.generate(PROMPT, max_tokens=last, on_token=lambda count: at_s.update({count: cluster.network.clock()}))
    return (at_s[last] - at_s[first]) / (last - first)


def test_a_set_of_fast_and_half_as_fast_nodes_decodes_as_fast_as_its_links_allow(tmp_path: Path) -> None:
    """Twelve layers. Told nothing, each of the four groups serves three and waits for its slow node: 3 slow loads a
    token. Weighted, the fast groups serve four each and the slow ones two: 4 fast loads a token."""
    store = ExpertStore.open(tiny_store("mixtral", tmp_path, num_hidden_layers=12), verify=False)
    plain_s, weighted_s = token_s(store, told=False), token_s(store, told=True)
    # The shadow is wrong now and then, which costs a load.
    assert 3 * SLOW_S <= plain_s <= 1.25 * 3 * SLOW_S
    assert 4 * FAST_S <= weighted_s <= 1.25 * 4 * FAST_S
    assert plain_s / weighted_s == pytest.approx(1.5, rel=0.1)
