"""Forecasts by a small model trained on recorded traces (after MoE-Beyond). Knows nothing of how it was trained.

It sees the previous token's experts of all layers, this token's experts of the layers that have been routed by then,
and which layer is asked for; it answers with a score for each of that layer's experts.

B examples, I indices of an example, L layers, E experts, W width.
"""

from collections.abc import Iterable
from typing import Final

import torch
from torch import Tensor, nn

from odmoe_predictor.rivals.base import Forecasts, Shape
from odmoe_wire.messages import Wants

_ENTRY_BYTES: Final = 8


class ExpertScores(nn.Module):
    """An MLP. Its inputs are sparse, so an example is the list of the places that are 1: first come the previous
    token's experts, then this token's, then the layer; `padding` stands for nothing."""

    def __init__(self, shape: Shape, *, look_ahead: int, width: int) -> None:
        super().__init__()
        self.shape = shape
        self.look_ahead = look_ahead
        self.width = width
        self._num_choices = shape.num_layers * shape.num_experts
        self.padding = 2 * self._num_choices + shape.num_layers
        self.inputs = nn.EmbeddingBag(self.padding + 1, width, mode="sum", padding_idx=self.padding)
        # Of sums of a few dozen rows.
        nn.init.normal_(self.inputs.weight, std=0.1)
        self.hidden = nn.Linear(width, width)
        # Layers' experts have nothing in common but their numbers, so each layer has an output of its own.
        self.outputs_LEW = nn.Parameter(torch.randn(shape.num_layers, shape.num_experts, width) / width**0.5)
        self.biases_LE = nn.Parameter(torch.zeros(shape.num_layers, shape.num_experts))

    def forward(self, index_BI: Tensor, layer_B: Tensor) -> Tensor:
        """Scores [B, E] of the experts of `layer_B`."""
        h_BW = torch.relu(self.inputs(index_BI))
        h_BW = h_BW + torch.relu(self.hidden(h_BW))
        return torch.einsum("bew,bw->be", self.outputs_LEW[layer_B], h_BW) + self.biases_LE[layer_B]

    def places(self, *, layer: int, before: Forecasts, now: Forecasts) -> list[int]:
        """The inputs for a layer: the previous token's experts, and this token's up to `layer` - look_ahead."""
        seen = {known: experts for known, experts in now.items() if known <= layer - self.look_ahead}
        return [
            *self._choices(before),
            *(self._num_choices + place for place in self._choices(seen)),
            2 * self._num_choices + layer,
        ]

    def _choices(self, layers: Forecasts) -> Iterable[int]:
        return (layer * self.shape.num_experts + expert for layer, experts in layers.items() for expert in experts)


class TrainedRival:
    """Forecasts layer l when layer l - look_ahead is routed, and the first layers when the token begins."""

    wants: Final[Wants] = "routings"

    def __init__(self, model: ExpertScores) -> None:
        self._model = model.eval()
        # What the previous token's layers chose, and this one's so far.
        self._before: dict[int, Forecasts] = {}
        self._now: dict[int, Forecasts] = {}

    @property
    def held_bytes(self) -> int:
        """The weights, and eight an expert remembered."""
        remembered = (layers for both in (self._before, self._now) for layers in both.values())
        entries = sum(len(experts) for layers in remembered for experts in layers.values())
        return sum(parameter.nbytes for parameter in self._model.parameters()) + _ENTRY_BYTES * entries

    def begin(self, sequence: int) -> None:
        """Nothing has been chosen yet."""
        self._before[sequence], self._now[sequence] = {}, {}

    def end(self, sequence: int) -> None:
        """Forget the sequence."""
        self._before.pop(sequence, None)
        self._now.pop(sequence, None)

    def on_token(self, sequence: int) -> Forecasts:
        """The first layers, of which nothing is known in time but the previous token."""
        self._before[sequence], self._now[sequence] = self._now[sequence], {}
        return self._forecast(sequence, range(min(self._model.look_ahead, self._model.shape.num_layers)))

    def on_routed(self, sequence: int, layer: int, experts: list[int], x_TH: Tensor | None) -> Forecasts:
        """The layer that many further on."""
        self._now[sequence][layer] = experts
        ahead = layer + self._model.look_ahead
        return self._forecast(sequence, [ahead]) if ahead < self._model.shape.num_layers else {}

    @torch.inference_mode()
    def _forecast(self, sequence: int, layers: Iterable[int]) -> Forecasts:
        model, before, now = self._model, self._before[sequence], self._now[sequence]
        forecasts = {}
        for layer in layers:
            index_BI = torch.tensor([model.places(layer=layer, before=before, now=now)])
            scores_BE = model(index_BI, torch.tensor([layer]))
            forecasts[layer] = sorted(scores_BE[0].topk(model.shape.top_k).indices.tolist())
        return forecasts
