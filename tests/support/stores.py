"""Expert stores of tiny checkpoints, and a model that runs its experts straight out of one: no node, no wire."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from odmoe_model import seam
from odmoe_model.experts import ExpertMaths
from odmoe_model.prepare import prepare
from odmoe_model.skeleton import load_skeleton
from odmoe_model.store import ExpertStore
from support.tiny import tiny_checkpoint


def tiny_store(family: str, directory: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Write a tiny checkpoint to `directory`/checkpoint and its store to `directory`/store; returns the latter."""
    tiny_checkpoint(family, directory / "checkpoint", seed=seed, **overrides)
    prepare(directory / "checkpoint", directory / "store")
    return directory / "store"


def local_experts(store: ExpertStore) -> Callable[[seam.ExpertsCall], Tensor]:
    """A seam handler that computes every expert on the store's own pages."""
    maths = ExpertMaths(store.manifest)

    def handle(call: seam.ExpertsCall) -> Tensor:
        groups = seam.group_rows(call.index_TK)
        outputs = {
            expert: maths.rows(store.fields(store.record(call.layer, expert)), call.x_TH[token_N])
            for expert, (token_N, _) in groups.items()
        }
        return seam.combine(call.x_TH, call.weight_TK, groups, outputs)

    return handle


def local_model(store: ExpertStore) -> PreTrainedModel:
    """The store's skeleton with `local_experts` in its seam."""
    model = load_skeleton(store, device="cpu")
    seam.install(model, local_experts(store))
    return model
