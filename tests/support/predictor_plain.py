"""What tests of the predictor compare with: a weight that is not quantised, and the full model step by step."""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from odmoe_model import seam
from odmoe_model.kvcache import export_cache
from odmoe_model.quantize import Treatment
from odmoe_model.skeleton import load_skeleton
from odmoe_model.store import ExpertStore
from odmoe_wire.messages import CacheLayer
from support.stores import local_experts

Routings = dict[int, list[int]]


class PlainWeight:
    """The weight itself: a shadow of such weights is a second full model."""

    treatment: Treatment = "kept"

    def __init__(self, weight_NK: Tensor) -> None:
        self._weight_NK = weight_NK.clone()

    def linear(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        return torch.nn.functional.linear(x, self._weight_NK)

    def tensors(self) -> tuple[Tensor, ...]:
        """The weight."""
        return (self._weight_NK,)


class FullModel:
    """The full model of a store with its one sequence; `routings` are those of the newest step, layer by layer, and
    `inputs` the rows the gates saw."""

    def __init__(self, store: ExpertStore) -> None:
        self._model: Any = load_skeleton(store, device="cpu")
        self._experts = local_experts(store)
        seam.install(self._model, self._on_experts)
        self.cache = DynamicCache(config=self._model.config)
        self.routings: Routings = {}
        self.inputs: dict[int, Tensor] = {}
        self.vocab_size: int = self._model.config.vocab_size

    @torch.inference_mode()
    def step(self, tokens: list[int]) -> int:
        """Feed tokens; the greedy next one."""
        self.routings = {}
        output = self._model(input_ids=torch.tensor([tokens]), past_key_values=self.cache, use_cache=True)
        return int(output.logits[0, -1].argmax())

    def export(self, rows: int) -> tuple[list[CacheLayer], list[Tensor]]:
        """What an Align would carry."""
        return export_cache(self.cache, rows=rows)

    @property
    def length(self) -> int:
        return int(self.cache.get_seq_length())

    def _on_experts(self, call: seam.ExpertsCall) -> Tensor:
        self.inputs[call.layer] = call.x_TH.clone()
        self.routings[call.layer] = sorted(set(call.index_TK.flatten().tolist()))
        return self._experts(call)


def recall(forecast: Routings, actual: Routings) -> float:
    """Correctly forecast experts over needed ones, of one step."""
    needed = sum(map(len, actual.values()))
    return sum(len(set(forecast.get(layer, ())) & set(experts)) for layer, experts in actual.items()) / needed
