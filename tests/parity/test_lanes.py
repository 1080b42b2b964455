"""Sequences decoded together, and drafts verified together, give the bits each token would have had alone.

Every supported family, real model, node and shadow code on one thread. The logits are compared to the bit, the tokens
with transformers' own.
"""

from pathlib import Path

import pytest
import torch

from odmoe_model.family import SUPPORTED_FAMILIES
from odmoe_model.store import ExpertStore
from odmoe_server.engine.build import EngineOptions
from support.loopback_cluster import LoopbackCluster
from support.reference import reference_tokens
from support.stores import tiny_store

# Longer than the windows of the tiny models, so that drafts are taken out of full windows too.
PROMPTS = ([3, 5, 7, 11, 13], [(7 * i * i + 2) % 120 + 1 for i in range(41)], [9] * 20)
NUM_TOKENS = 14


def cluster_of(store: ExpertStore, *, draft: int) -> LoopbackCluster:
    options = EngineOptions(endpoint="inproc://unused", draft=draft, prefill_chunk=32)
    cluster = LoopbackCluster(store, options=options)
    cluster.add_predictor(run_ahead=8)
    for peer_id in ("n0", "n1", "n2"):
        cluster.add_node(peer_id, slots=1, predictor=True)
    cluster.await_members("n0", "n1", "n2", "predictor")
    cluster.settle(seconds=0.5)
    return cluster


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_the_bits_are_those_of_one_token_at_a_time(family: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    store = ExpertStore.open(tiny_store(family, tmp_path), verify=False)
    plain = cluster_of(store, draft=0)
    alone: list[list[torch.Tensor]] = []
    for prompt in PROMPTS:
        logits: list[torch.Tensor] = []
        tokens, stats = plain.generate(prompt, max_tokens=NUM_TOKENS, on_logits=logits.append)
        assert tokens == reference_tokens(tmp_path / "checkpoint", prompt, NUM_TOKENS)
        assert stats.drafted == 0
        alone.append(logits)
    for draft in (0, 4):
        cluster = cluster_of(store, draft=draft)
        _, together = cluster.generate_together(PROMPTS, max_tokens=NUM_TOKENS)
        for expected, found in zip(alone, together, strict=True):
            assert len(expected) == len(found)
            assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True)), f"{draft} drafts"
        assert (cluster.total.accepted > 0) == (draft > 0)
        assert cluster.total.accepted <= cluster.total.drafted
        cluster.assert_nothing_held()
