"""Experts computed while they are on a slow link, in a whole cluster on sockets: the same tokens, waited for less."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from odmoe_model.store import ExpertStore
from odmoe_node.bank_emulated import EmulatedBank
from support.cluster import local_cluster
from support.reference import reference_tokens
from support.stores import tiny_store

PROMPT = [(7 * i * i + 2) % 127 + 1 for i in range(11)]
NUM_TOKENS = 12
LOAD_S = 0.004


@pytest.mark.parametrize("predictor", [True, False])
def test_tokens_are_transformers_own_and_experts_are_computed_as_they_arrive(
    predictor: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ExpertStore.open(tiny_store("mixtral", tmp_path), verify=False)
    ridden: list[tuple[str, float]] = []
    whole = EmulatedBank.rows_on_arrival

    def spy(self: EmulatedBank, slot: int, x_NH: Tensor, *runs: Any) -> tuple[Tensor, float]:
        rows_NH, waited_s = whole(self, slot, x_NH, *runs)
        ridden.append((threading.current_thread().name, waited_s))
        return rows_NH, waited_s

    monkeypatch.setattr(EmulatedBank, "rows_on_arrival", spy)
    link_gbps = store.manifest.record_bytes / LOAD_S / 1e9
    with local_cluster(store, tmp_path, nodes=4, predictor=predictor, link_gbps=link_gbps) as cluster:
        tokens, finished = cluster.generate(PROMPT, max_tokens=NUM_TOKENS)
        agents = [node.agent for node in cluster.nodes.values()]
        loads = sum(agent.state.counters.loads for agent in agents)
        assert [agent.loop_errors for agent in agents] == [0] * 4
    assert tokens == reference_tokens(tmp_path / "checkpoint", PROMPT, NUM_TOKENS)
    assert 0 < len(ridden) <= loads
    first = {name.rpartition("-")[2] for name, _ in ridden[:1]}
    assert first == {"compute"}, "of unknown length: not where messages are heard"
    assert max(waited_s for _, waited_s in ridden) > 0.1 * LOAD_S
    stats = finished.expert_stats
    assert stats.hit + stats.late + stats.missed == stats.activations
    assert stats.wait_s > 0.25 * LOAD_S * stats.missed, "what computes waited for on the link is told"
    assert predictor or stats.missed > 0


def test_a_stage_at_a_time_gives_a_whole_expert(tmp_path: Path) -> None:
    """On threads and a link on which a load takes a while: rows that came before, in the middle of and after it."""
    store = ExpertStore.open(tiny_store("gpt_oss", tmp_path), verify=False)
    bank = EmulatedBank(store, num_slots=1, bytes_per_s=store.manifest.record_bytes / 0.05)
    x_NH = torch.randn(2, 64, generator=torch.Generator().manual_seed(2))
    for expert in range(3):
        bank.expect(0)
        load = threading.Thread(target=bank.load, args=(0, 1, expert))
        load.start()
        found_NH, waited_s = bank.rows_on_arrival(0, x_NH)
        load.join()
        assert torch.equal(found_NH, bank.rows(0, x_NH))
        assert waited_s > 0.02
