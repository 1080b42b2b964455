"""Greedy output is transformers' own, with every option of on-demand mode on and off. One thread, virtual time.

Each option is varied by itself against the defaults, and a few together. A prompt that is longer than a chunk, so that
all of it is met: prompt, alignment after it, decode steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from odmoe_model.store import ExpertStore
from odmoe_predictor.process import QUANTIZERS
from odmoe_server.engine.align import Periods
from odmoe_server.engine.build import EngineOptions
from support.loopback_cluster import LoopbackCluster
from support.reference import reference_tokens
from support.stores import tiny_store

PROMPT = [(5 * i * i + 3) % 127 + 1 for i in range(37)]
NUM_TOKENS = 10


@dataclass(frozen=True, kw_only=True)
class Setup:
    """`slots` has one number a node."""

    slots: Sequence[int] = (1, 1)
    predictor: bool = True
    precision: Any = "int8"
    scope: Any = "model"
    run_ahead: int = 1
    feedback: bool = True
    periods: Periods = field(default_factory=Periods)
    options: dict[str, Any] = field(default_factory=dict)


def periods(*pairs: tuple[int | None, int | None]) -> dict[str, Setup]:
    return {f"token {token}, kv {kv}": Setup(periods=Periods(token=token, kv=kv)) for token, kv in pairs}


def engine(**options: Any) -> Setup:
    return Setup(options=options)


SETUPS: dict[str, Setup] = {
    "defaults": Setup(),
    **periods((1, 2), (2, 1), (4, 4), (8, 16), (16, 8), (None, 1), (1, None), (None, None)),
    **{f"run ahead {ahead}": Setup(run_ahead=ahead) for ahead in (0, 3)},
    **{f"{name} of the model": Setup(precision=name) for name in ("fp16", "nf4", "int4")},
    **{f"{name} of the experts": Setup(precision=name, scope="experts") for name in ("fp16", "int8", "nf4", "int4")},
    "no feedback": Setup(feedback=False),
    "no feedback, lru": Setup(feedback=False, options={"slot_mode": "lru"}, slots=(3, 2)),
    "no predictor": Setup(predictor=False),
    "no predictor, lru": Setup(predictor=False, options={"slot_mode": "lru"}, slots=(3, 2)),
    "lru": Setup(options={"slot_mode": "lru"}, slots=(3, 2)),
    "lru, one slot": Setup(options={"slot_mode": "lru"}),
    "own prompt": Setup(periods=Periods(prompt="own")),
    "own prompt, no run-ahead": Setup(periods=Periods(prompt="own"), run_ahead=0),
    "own prompt, never aligned": Setup(periods=Periods(prompt="own", token=None, kv=None), run_ahead=3),
    "prompt whole": engine(prefill_chunk=None),
    "chunks of 16": engine(prefill_chunk=16),
    "chunks that end with the prompt": engine(prefill_chunk=len(PROMPT)),
    "chunks of 16, own prompt": replace(engine(prefill_chunk=16), periods=Periods(prompt="own")),
    "chunks of 16, lru": Setup(options={"prefill_chunk": 16, "slot_mode": "lru"}, slots=(2, 2)),
    "groups of one": Setup(options={"group_size": 1}, slots=(1, 1, 1)),
    "groups of two of three nodes": Setup(options={"group_size": 2}, slots=(1, 1, 1)),
    "a group larger than the cluster": Setup(options={"group_size": 5}),
    "uneven slots": Setup(slots=(1, 3)),
    "uneven slots and groups": Setup(slots=(2, 1, 4), options={"group_size": 2}),
    "a single node": Setup(slots=(1,)),
    "drafts": Setup(run_ahead=8, options={"draft": 3}),
    "drafts, no feedback": Setup(run_ahead=8, options={"draft": 7}, feedback=False),
    "drafts of a bad shadow": Setup(run_ahead=8, options={"draft": 3}, precision="nf4"),
    "drafts, hardly aligned": Setup(run_ahead=8, options={"draft": 3}, periods=Periods(token=4, kv=8)),
    "drafts, four nodes": Setup(run_ahead=8, options={"draft": 3}, slots=(1, 1, 1, 1)),
    "drafts, more slots": Setup(run_ahead=8, options={"draft": 3}, slots=(3, 2)),
    "drafts, lru": Setup(run_ahead=8, options={"draft": 3, "slot_mode": "lru"}, slots=(3, 2)),
    "drafts, groups of one": Setup(run_ahead=8, options={"draft": 3, "group_size": 1}, slots=(1, 1, 1)),
    "drafts, chunks of 16": Setup(run_ahead=8, options={"draft": 3, "prefill_chunk": 16}),
}


@pytest.fixture(scope="module")
def store_and_expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[ExpertStore, list[int]]:
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("mixtral")
    store = ExpertStore.open(tiny_store("mixtral", directory), verify=False)
    return store, reference_tokens(directory / "checkpoint", PROMPT, NUM_TOKENS)


def ready_cluster(store: ExpertStore, setup: Setup) -> LoopbackCluster:
    options = EngineOptions(endpoint="inproc://unused", periods=setup.periods, **setup.options)
    cluster = LoopbackCluster(store, options=options)
    members = [f"n{number}" for number in range(len(setup.slots))]
    if setup.predictor:
        quantize = QUANTIZERS[setup.precision]
        cluster.add_predictor(run_ahead=setup.run_ahead, quantize=quantize, scope=setup.scope, feedback=setup.feedback)
    for peer_id, slots in zip(members, setup.slots, strict=True):
        cluster.add_node(peer_id, slots=slots, predictor=setup.predictor)
    cluster.await_members(*members, *(["predictor"] if setup.predictor else []))
    cluster.settle(seconds=0.5)  # views and hellos between predictor and nodes
    return cluster


@pytest.mark.parametrize("name", SETUPS)
def test_the_answer_is_the_same(store_and_expected: tuple[ExpertStore, list[int]], name: str) -> None:
    store, expected = store_and_expected
    setup = SETUPS[name]
    cluster = ready_cluster(store, setup)
    tokens, stats = cluster.generate(PROMPT, max_tokens=NUM_TOKENS)
    assert tokens == expected
    forecast = stats.predicted + cluster.state.dispatch.predicted_late_total
    assert (forecast > 0) == setup.predictor, "an option must not have switched the predictor off"
    if setup.predictor:
        assert cluster.predictor.worker.counters.failed == 0
    if setup.options.get("draft") and setup.periods.token == 1:
        assert stats.accepted > 0, "an option must not have switched drafts off"
    cluster.assert_nothing_held() if setup.options.get("slot_mode") != "lru" else None
