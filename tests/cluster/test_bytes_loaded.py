"""What an answer's decode steps had loaded for them, against what the nodes loaded."""

from pathlib import Path

import pytest
import torch

from odmoe_model.store import ExpertStore
from odmoe_server.engine.build import EngineOptions
from odmoe_wire.messages import SlotMode
from support.loopback_cluster import LoopbackCluster
from support.stores import tiny_store

PROMPT = [(5 * i * i + 3) % 127 + 1 for i in range(20)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ExpertStore:
    torch.set_num_threads(1)
    directory: Path = tmp_path_factory.mktemp("bytes")
    return ExpertStore.open(tiny_store("qwen3_moe", directory), verify=False)


def loads(cluster: LoopbackCluster) -> int:
    return sum(agent.state.counters.loads for agent in cluster.agents.values())


@pytest.mark.parametrize("slot_mode", ["on-demand", "lru"])
@pytest.mark.parametrize("predictor", [False, True])
def test_bytes_loaded_are_those_of_the_nodes(store: ExpertStore, slot_mode: SlotMode, predictor: bool) -> None:
    """Forecasts that were wrong load something more, which no answer is charged with."""
    options = EngineOptions(endpoint="inproc://unused", prefill_chunk=16, slot_mode=slot_mode)
    cluster = LoopbackCluster(store, options=options)
    if predictor:
        cluster.add_predictor()
    for name in ("n0", "n1"):
        cluster.add_node(name, slots=8, predictor=predictor)
    cluster.await_members("n0", "n1", *(["predictor"] if predictor else []))
    prompt_loads: list[int] = []
    _, stats = cluster.generate(
        PROMPT, max_tokens=12, on_token=lambda count: prompt_loads.append(loads(cluster)) if count == 1 else None
    )
    unused = sum(agent.state.counters.loads_unused for agent in cluster.agents.values())
    loaded = stats.loaded_bytes // store.manifest.record_bytes
    assert stats.loaded_bytes == loaded * store.manifest.record_bytes > 0
    if slot_mode == "on-demand":
        assert loaded == stats.activations
    else:
        assert loaded < stats.activations, "what rests in a slot is not loaded again"
    if predictor:
        assert loaded <= loads(cluster) - prompt_loads[0] <= loaded + unused + len(cluster.agents) * 8
    else:
        assert loaded == loads(cluster) - prompt_loads[0]
