"""The shadow computes the prompt's keys and values itself: what is sent, what is not, and how good it is."""

from pathlib import Path

import pytest
import torch

from odmoe_model.store import ExpertStore
from odmoe_predictor import shadow
from odmoe_server.engine.align import Periods
from odmoe_server.engine.build import EngineOptions
from odmoe_wire.messages import Align, Schedule
from support.loopback_cluster import LoopbackCluster
from support.reference import reference_tokens
from support.stores import tiny_store

PROMPT = [(5 * i * i + 3) % 127 + 1 for i in range(37)]
NUM_TOKENS = 10
NODES = ("a", "b")


def ready_cluster(directory: Path, *, run_ahead: int = 0) -> LoopbackCluster:
    options = EngineOptions(endpoint="inproc://unused", periods=Periods(prompt="own"), prefill_chunk=16)
    cluster = LoopbackCluster(ExpertStore.open(directory / "store", verify=False), options=options)
    cluster.add_predictor(run_ahead=run_ahead)
    for peer_id in NODES:
        cluster.add_node(peer_id, predictor=True)
    cluster.await_members(*NODES, "predictor")
    cluster.settle(seconds=1.0)
    return cluster


# Growing keys and values, a sliding window with biases, short convolutions.
@pytest.fixture(scope="module", params=["mixtral", "gpt_oss", "lfm2_moe"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp(request.param)
    tiny_store(request.param, directory)
    return directory


def told(cluster: LoopbackCluster, kind: type[Align] | type[Schedule]) -> list[Align | Schedule]:
    return [sent.message for sent in cluster.network.story if isinstance(sent.message, kind)]


@pytest.mark.parametrize("run_ahead", [0, 2])
def test_the_prompt_goes_as_tokens_and_is_not_forecast(
    directory: Path, run_ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shadow, "MOST_ROWS", 10)  # the shadow takes it in pieces of its own
    cluster = ready_cluster(directory, run_ahead=run_ahead)
    tokens, stats = cluster.generate(PROMPT, max_tokens=NUM_TOKENS)
    assert tokens == reference_tokens(directory / "checkpoint", PROMPT, NUM_TOKENS)
    prompt, first, *others = told(cluster, Align)
    assert (prompt.position, prompt.tokens, prompt.cache) == (0, PROMPT, [])  # type: ignore[union-attr]
    assert (first.position, first.tokens, first.cache) == (len(PROMPT), tokens[:1], [])  # type: ignore[union-attr]
    assert all(align.cache[-1].length == align.position for align in others)  # type: ignore[union-attr]
    positions = {schedule.span.position for schedule in told(cluster, Schedule)}  # type: ignore[union-attr]
    assert min(positions) == len(PROMPT)
    late = cluster.state.dispatch.predicted_late_total
    assert (stats.predicted + late) / stats.activations > 0.85
    assert cluster.predictor.worker.counters.failed == 0
    cluster.assert_nothing_held()


def test_a_predictor_that_comes_after_the_prompt_gets_everything(directory: Path) -> None:
    cluster = ready_cluster(directory)

    def replaced(count: int) -> None:
        if count == 1:
            cluster.kill_predictor()
            cluster.await_members(*NODES)
            cluster.revive_predictor()
            cluster.await_members(*NODES, "predictor")

    tokens, _ = cluster.generate(PROMPT, max_tokens=NUM_TOKENS, on_token=replaced)
    assert tokens == reference_tokens(directory / "checkpoint", PROMPT, NUM_TOKENS)
    prompt, first, *_ = told(cluster, Align)
    assert not prompt.cache  # type: ignore[union-attr]
    assert first.cache[0].length == len(PROMPT)  # type: ignore[union-attr]
