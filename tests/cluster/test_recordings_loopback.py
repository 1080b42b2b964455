"""Timeline and trace of a whole cluster on one thread: what is drawn is what happened, and the answer is the same."""

import itertools
from pathlib import Path

import pytest

from odmoe_model.store import ExpertStore
from odmoe_model.trace import TraceReader
from odmoe_server.cluster.timeline_file import record_timeline
from odmoe_server.engine.recordings import header_of
from odmoe_server.engine_api import ExpertStats
from odmoe_server.moe.trace import record_trace
from support.drawn import Slice, read, slices_of
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


class Recorded:
    """One answer, its timeline and its trace. The timeline's clock ticks a second with every look at it, so that
    what came first is first whatever the machine's speed; the durations in messages are real and far shorter."""

    def __init__(self, store: ExpertStore, directory: Path, *, predictor: bool) -> None:
        self.cluster = LoopbackCluster(store)
        if predictor:
            self.cluster.add_predictor()
        for peer_id in NODES:
            self.cluster.add_node(peer_id, predictor=predictor)
        self.cluster.await_members(*NODES, *(["predictor"] if predictor else []))
        self.cluster.settle(seconds=1.0)
        ticks = itertools.count(1.0)
        timeline_path, trace_path = directory / "timeline.json", directory / "trace.jsonl"
        layers = store.manifest.num_moe_layers
        self.cluster.driver.timeline, drawer = record_timeline(
            timeline_path, num_layers=layers, facts={}, clock=lambda: next(ticks)
        )
        tracer = record_trace(trace_path, header_of(store.manifest))
        self.cluster.trace = tracer.put
        self.tokens, self.stats = self.cluster.generate(PROMPT, max_tokens=NUM_TOKENS)
        drawer.close()
        tracer.close()
        self.document = read(timeline_path)
        self.slices = slices_of(self.document["traceEvents"])
        self.trace = TraceReader.open(trace_path)

    def on(self, row: str) -> list[Slice]:
        return [piece for piece in self.slices if piece.row == row]


def is_hit(compute: Slice) -> bool:
    return bool(compute.args["outcome"] == "hit")


@pytest.fixture(scope="module")
def recorded(store_and_expected: tuple[ExpertStore, list[int]], tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return Recorded(store_and_expected[0], tmp_path_factory.mktemp("recorded"), predictor=True)


def test_the_answer_is_the_same(recorded: Recorded, store_and_expected: tuple[ExpertStore, list[int]]) -> None:
    assert recorded.tokens == store_and_expected[1]
    recorded.cluster.assert_nothing_held()


def test_there_is_a_row_for_everybody(recorded: Recorded) -> None:
    layers = {f"layer {layer}" for layer in range(recorded.trace.header.num_layers)}
    rows = {(piece.process, piece.row) for piece in recorded.slices}
    assert rows >= {(process, layer) for process in ("server", "predictor") for layer in layers}
    assert rows >= {(f"node {node}", row) for node in NODES for row in ("load", "compute", "send")}
    assert ("server", "step") in rows


def test_forecast_loads_lie_before_their_computes(recorded: Recorded) -> None:
    hits = list(filter(is_hit, recorded.on("compute")))
    assert len(hits) > NUM_TOKENS
    for compute in hits:
        loads = [load for load in recorded.on("load") if (load.process, load.name) == (compute.process, compute.name)]
        # The node tells of a load behind the answer, and this clock has ticked for that and other nodes' answers.
        told_us = compute.ended + 3e6
        assert any(load.ended <= told_us and not load.args["on_demand"] for load in loads), compute


def test_what_was_forecast_was_drawn_before_its_layer_ended(recorded: Recorded) -> None:
    for piece in recorded.slices:
        if piece.process == "server" and piece.args.get("forecast"):
            assert piece.args["forecast_lead_ms"] > -(piece.ended - piece.began) / 1e3, piece


def test_the_totals_are_those_of_the_engine(recorded: Recorded) -> None:
    totals = recorded.document["otherData"]["decode_totals"]
    stats: ExpertStats = recorded.stats
    assert totals["tokens"] == NUM_TOKENS - 1, "the first comes out of the prompt's step"
    found = (totals["experts_hit"], totals["experts_late"], totals["experts_miss"])
    assert found == (stats.hit, stats.late, stats.missed)


def test_without_a_predictor_every_load_is_on_demand(
    store_and_expected: tuple[ExpertStore, list[int]], tmp_path: Path
) -> None:
    recorded = Recorded(store_and_expected[0], tmp_path, predictor=False)
    assert "predictor" not in {piece.process for piece in recorded.slices}
    prompt = next(step for step in recorded.on("step") if step.name == "prompt 0")
    loads = [load for load in recorded.on("load") if load.ended > prompt.ended]
    assert len(loads) > NUM_TOKENS
    assert all(load.args["on_demand"] for load in loads)
    assert not [piece for piece in recorded.on("compute") if piece.ended > prompt.ended and is_hit(piece)]
    assert all(routing.forecast is None for routing in recorded.trace)


def test_the_trace_can_be_replayed(recorded: Recorded) -> None:
    steps = list(recorded.trace.steps())
    assert [step.spans[0].position for step in steps] == list(range(len(PROMPT), len(PROMPT) + NUM_TOKENS - 1))
    activations = predicted = 0
    for step in steps:
        assert list(step.layers) == list(range(recorded.trace.header.num_layers))
        for routing in step.layers.values():
            chosen = {expert for row in routing.experts for expert in row}
            activations += len(chosen)
            predicted += len(chosen & set(routing.forecast or ()))
    assert (activations, predicted) == (recorded.stats.activations, recorded.stats.predicted)
    assert predicted > activations / 2
