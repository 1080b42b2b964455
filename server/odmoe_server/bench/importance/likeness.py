"""How like the outputs of a layer's experts are, learned from text: which of them could stand in for which.

Of every row that a gate sends to an expert, what each other expert would have made of it: their squared distance over
the square of the expert's own output, averaged over the rows. Knows no slots and no scores.

Shape suffixes: L MoE layers, E experts, T token rows, H hidden size, P tokens of a text.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from odmoe_server.bench.importance.fleet import LayerLikeness
from odmoe_server.bench.importance.lanes import Gated, LaneModel, as_gated


class Outputs:
    """Sums over rows, as a model's `decide`; rows go where their gates send them."""

    def __init__(self, model: LaneModel, *, num_layers: int, num_experts: int) -> None:
        self._model, self._num_experts = model, num_experts
        self._distance_LEE = torch.zeros(num_layers, num_experts, num_experts)
        self._rows_LE = torch.zeros(num_layers, num_experts)

    def __call__(self, gated: Gated) -> tuple[Tensor, Tensor]:
        """Compare all experts of the layer on all its rows."""
        outputs_ETH = torch.stack(
            [self._model.rows(gated.layer, expert, gated.x_TH).float() for expert in range(self._num_experts)]
        )
        add_distances(self._distance_LEE[gated.layer], self._rows_LE[gated.layer], outputs_ETH, gated.index_TK)
        return as_gated(gated)

    def mean(self) -> Tensor:
        """[L, E, E] by layer, replaced and substitute: mean relative squared distance; infinite where no row says."""
        return torch.where(
            self._rows_LE[..., None] > 0, self._distance_LEE / self._rows_LE[..., None], torch.tensor(float("inf"))
        )


def add_distances(distance_EE: Tensor, rows_E: Tensor, outputs_ETH: Tensor, index_TK: Tensor) -> None:
    """Add a layer's rows: for each expert, over the rows sent to it, each other's relative squared distance."""
    for expert in range(len(outputs_ETH)):
        chosen_T = (index_TK == expert).any(dim=-1)
        own_TH = outputs_ETH[expert, chosen_T]
        square_T = own_TH.square().sum(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        apart_ET = (outputs_ETH[:, chosen_T] - own_TH).square().sum(dim=-1)
        distance_EE[expert] += (apart_ET / square_T).sum(dim=-1)
        rows_E[expert] += chosen_T.sum()


def learn(model: LaneModel, texts: Sequence[Tensor], *, num_layers: int, num_experts: int) -> Tensor:
    """`Outputs.mean` over texts of any length, [P] each."""
    outputs = Outputs(model, num_layers=num_layers, num_experts=num_experts)
    model.decide = outputs
    for tokens_P in texts:
        model.prompt(tokens_P[None])
    model.decide = as_gated
    return outputs.mean()


def by_distance(mean_LEE: Tensor) -> LayerLikeness:
    """The nearer the liker."""
    table = (-mean_LEE).tolist()
    return lambda layer, old, new: float(table[layer][old][new])
