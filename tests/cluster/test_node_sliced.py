"""A node with room for less than one expert beside one with room for two: the same text as transformers'."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from odmoe_model.store import ExpertStore
from odmoe_node.bank_sliced import SlicedBank
from odmoe_node.build import build_agent
from odmoe_node.config import NodeSettings
from odmoe_node.driver import NodeAgent
from support.cluster import LocalCluster, local_cluster
from support.reference import reference_tokens
from support.stores import tiny_store

PROMPT = [1, 5, 9, 77, 33, 3, 2, 8, 100, 64, 31]
NUM_TOKENS = 24
WAIT_S = 60.0


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ExpertStore:
    """An expert of it is 1.6 MB: the smallest budget there is, 1 MB, holds none."""
    directory = tmp_path_factory.mktemp("sliced")
    path = tiny_store("mixtral", directory, hidden_size=128, intermediate_size=1024, num_hidden_layers=2)
    return ExpertStore.open(path, verify=False)


@contextmanager
def sliced_node(cluster: LocalCluster) -> Iterator[NodeAgent]:
    """A node made of settings, as `odmoe-node` makes it, with the least memory that can be given."""
    settings = NodeSettings(
        store=cluster.store.path,
        server_endpoint=cluster.server_endpoint,
        predictor_endpoint=cluster.predictor_endpoint,
        memory_mb=1,
        device="cpu",
    )
    agent = build_agent(settings, node_id="small", context=cluster.context)
    thread = threading.Thread(target=agent.run, name="small", daemon=True)
    thread.start()
    try:
        yield agent
    finally:
        agent.stop()
        thread.join(WAIT_S)
        assert not thread.is_alive()


def test_a_node_smaller_than_an_expert_serves_with_others(
    store: ExpertStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="odmoe_node")
    expected = reference_tokens(store.path.parent / "checkpoint", PROMPT, NUM_TOKENS)
    with local_cluster(store, tmp_path, nodes=1, slots=2) as cluster, sliced_node(cluster) as agent:
        cluster.await_health(lambda engine: sum(peer.role == "node" for peer in engine.health().nodes) == 2)
        tokens, _ = cluster.generate(PROMPT, max_tokens=NUM_TOKENS)
        report = agent.report()
    assert tokens == expected
    assert isinstance(agent._bank, SlicedBank)
    assert (agent._hello.slots, agent._hello.budget_bytes) == (1, 1_000_000)
    assert report.loads_total > NUM_TOKENS, "it took part"
    assert report.compute_s_total > 0
    assert 0 < report.arena_bytes <= report.budget_bytes < store.manifest.record_bytes
    assert report.accounted_bytes in (0, report.arena_bytes)
    assert "an expert of 1.6 MB does not fit 1.0 MB: it is loaded and computed in 4 slices, 2 at a time" in caplog.text
