"""Training examples out of traces: each token with its experts and those of the token before. Knows no file format.

N tokens, L layers, K experts a token, B examples, I indices of an example.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from odmoe_model.trace import TracedStep
from odmoe_predictor.rivals.base import Shape
from odmoe_predictor.rivals.trained import ExpertScores


@dataclass(frozen=True)
class Tokens:
    """`experts_NLK` of each token; `before_N` is the row of the token before it, -1 where that is not known."""

    experts_NLK: Tensor
    before_N: Tensor

    def __len__(self) -> int:
        return len(self.before_N)

    def split(self, share: float) -> tuple["Tokens", "Tokens"]:
        """The first tokens, and the last `share` of them; the latter lose sight of what came before them."""
        first = len(self) - round(share * len(self))
        later = self.before_N[first:] - first
        return (
            Tokens(self.experts_NLK[:first], self.before_N[:first]),
            Tokens(self.experts_NLK[first:], torch.where(later < 0, -1, later)),
        )


def tokens_of(steps: Iterable[TracedStep], shape: Shape) -> Tokens:
    """All tokens of which every layer is there; sequences are told apart by their numbers and positions."""
    rows: list[Tensor] = []
    before: list[int] = []
    # The sequence's newest token: its position and its row.
    newest: dict[int, tuple[int, int]] = {}
    for step in steps:
        if len(step.layers) < shape.num_layers:
            continue
        experts_TLK = torch.tensor([step.layers[layer].experts for layer in range(shape.num_layers)]).transpose(0, 1)
        positions = [(span.sequence, span.position + i) for span in step.spans for i in range(span.length)]
        for (sequence, position), experts_LK in zip(positions, experts_TLK, strict=True):
            known = newest.get(sequence)
            before.append(known[1] if known is not None and known[0] == position - 1 else -1)
            newest[sequence] = (position, len(rows))
            rows.append(experts_LK)
    empty_NLK = torch.empty(0, shape.num_layers, shape.top_k, dtype=torch.int64)
    return Tokens(torch.stack(rows) if rows else empty_NLK, torch.tensor(before, dtype=torch.int64))


def joined(parts: list[Tokens]) -> Tokens:
    """The tokens of several traces, each of which stays by itself."""
    starts = [sum(len(part) for part in parts[:i]) for i in range(len(parts))]
    before = [
        torch.where(part.before_N < 0, -1, part.before_N + start) for part, start in zip(parts, starts, strict=True)
    ]
    return Tokens(torch.cat([part.experts_NLK for part in parts]), torch.cat(before))


def inputs_of(model: ExpertScores, tokens: Tokens, token_B: Tensor, layer_B: Tensor) -> Tensor:
    """index_BI, what `ExpertScores.places` gives for each token and layer, padded to the same length."""
    shape = model.shape
    num_choices = shape.num_layers * shape.num_experts
    place_L = torch.arange(shape.num_layers)
    before_B = tokens.before_N[token_B]
    before_BLK = tokens.experts_NLK[before_B.clamp(min=0)] + place_L[:, None] * shape.num_experts
    before_BLK = before_BLK.masked_fill((before_B < 0)[:, None, None], model.padding)
    now_BLK = tokens.experts_NLK[token_B] + place_L[:, None] * shape.num_experts + num_choices
    hidden_BL = place_L > (layer_B - model.look_ahead)[:, None]
    now_BLK = now_BLK.masked_fill(hidden_BL[:, :, None], model.padding)
    layer_B1 = 2 * num_choices + layer_B[:, None]
    return torch.cat([before_BLK.flatten(1), now_BLK.flatten(1), layer_B1], dim=1)
