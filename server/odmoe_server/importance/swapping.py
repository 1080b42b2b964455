"""Substitution on tensors: from a gate's choice and scores to the choice that is served. Decides nothing itself.

A substitute has the weight the gate gives it: its own before normalisation, in the unit of the expert it replaces.
Where the family holds a token's weights to a fixed sum, they are held to it again (the paper leaves this open; its
authors' code does the same). Nothing is touched where nothing is replaced, so that those bits stay.

T token rows, K experts a token, E experts.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import Tensor

from odmoe_model.scores import Scores
from odmoe_server.importance.substitution import Choice, Likeness, Swap, substitute


@dataclass(frozen=True, kw_only=True)
class Routed:
    """One gate's word for the rows of one sequence. `alpha` and `max_weight`: see `Choice`."""

    index_TK: Tensor
    weight_TK: Tensor
    scores: Scores
    alpha: float
    max_weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Served:
    """What is computed in its place, and what was replaced for each row."""

    index_TK: Tensor
    weight_TK: Tensor
    swaps: tuple[tuple[Swap, ...], ...]

    @property
    def num_substituted(self) -> int:
        """Experts of tokens that others stand in for."""
        return sum(map(len, self.swaps))


def serve(
    routed: Sequence[Routed], *, at_hand: Collection[int], normalised: bool, likeness: Likeness | None = None
) -> list[Served]:
    """The step's choices at one layer, served with the experts `at_hand` as far as may be; see `substitute`."""
    choices = [choices_of(one) for one in routed]
    swaps = iter(substitute([choice for rows in choices for choice in rows], at_hand=at_hand, likeness=likeness))
    return [
        swapped(one, tuple(next(swaps) for _ in rows), normalised) for one, rows in zip(routed, choices, strict=True)
    ]


def choices_of(routed: Routed) -> list[Choice]:
    """Each row as the rules see it."""
    rows = zip(routed.index_TK.tolist(), routed.scores.score_TE.tolist(), routed.scores.weight_TE.tolist(), strict=True)
    return [
        Choice(experts=tuple(experts), scores=scores, weights=weights, alpha=routed.alpha, max_weight=routed.max_weight)
        for experts, scores, weights in rows
    ]


def swapped(routed: Routed, swaps: tuple[tuple[Swap, ...], ...], normalised: bool) -> Served:
    """The choices of one gate's rows with these swaps carried out, a tuple of them for each row."""
    if not any(swaps):
        return Served(index_TK=routed.index_TK, weight_TK=routed.weight_TK, swaps=swaps)
    index_TK, weight_TK = routed.index_TK.clone(), routed.weight_TK.clone()
    for row, row_swaps in enumerate(swaps):
        if not row_swaps:
            continue
        unit_E = routed.scores.weight_TE[row]
        for swap in row_swaps:
            index_TK[row, swap.place] = swap.new
            weight_TK[row, swap.place] *= unit_E[swap.new] / unit_E[swap.old]
        if normalised:
            weight_TK[row] *= routed.weight_TK[row].sum() / weight_TK[row].sum()
    return Served(index_TK=index_TK, weight_TK=weight_TK, swaps=swaps)
