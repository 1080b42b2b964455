"""Server, predictor and two node agents over real sockets, one slot each: greedy tokens equal transformers' own.

Every supported family. The reference is `generate` with the eager experts implementation on the same checkpoint.
"""

from pathlib import Path

import pytest
import torch

from odmoe_model.family import SUPPORTED_FAMILIES
from odmoe_model.store import ExpertStore
from support.cluster import local_cluster
from support.reference import reference_tokens
from support.stores import tiny_store

PROMPTS = ([3, 5, 7, 11, 13], [9] * 20, [1, 2])
NUM_TOKENS = 64


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_greedy_tokens_equal_those_of_transformers(family: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    store = ExpertStore.open(tiny_store(family, tmp_path), verify=True)
    assert store.manifest.num_experts > 2, "there must be fewer slots than experts"
    with local_cluster(store, tmp_path, nodes=2, slots=1) as cluster:
        for prompt in PROMPTS:
            tokens, finished = cluster.generate(prompt, max_tokens=NUM_TOKENS)
            assert tokens == reference_tokens(tmp_path / "checkpoint", prompt, NUM_TOKENS)
            assert finished.reason == "length"
            stats = finished.expert_stats
            assert stats.hit + stats.late + stats.missed == stats.activations > 0
        # In one process the shadow has to share one interpreter with all others, and often comes too late.
        totals = cluster.engine.health().totals
        assert totals.predicted + totals.predicted_late > 0, "the shadow's forecasts must reach the server"
