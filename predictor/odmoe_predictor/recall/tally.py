"""Recall as OD-MoE defines it: right experts over all experts needed, of everything and of each token index. Pure.

Shape suffixes: L MoE layers, b sequences, K experts a token, N token index in the answer.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Tally:
    """Of each token index: experts forecast rightly, and answers that have such a token; each needs `num_needed`.
    `agreed` of `guesses`: tokens of the answers but the first that the predictor, too, would have gone on with."""

    hits_N: list[int]
    alive_N: list[int]
    num_needed: int
    agreed: int = 0
    guesses: int = 0

    @property
    def recall(self) -> float:
        """Of all tokens of all answers."""
        return sum(self.hits_N) / (self.num_needed * sum(self.alive_N))

    @property
    def agreement(self) -> float | None:
        """Share of the guesses that were right; None where there was none."""
        return self.agreed / self.guesses if self.guesses else None

    @property
    def curve(self) -> list[float]:
        """Of each token index."""
        return [hits / (self.num_needed * alive) for hits, alive in zip(self.hits_N, self.alive_N, strict=True)]


def num_hits_b(forecast_LbK: Tensor, needed_LbK: Tensor) -> Tensor:
    """How many of the needed experts of all layers were forecast, [b]; the experts of a token are all different."""
    return (needed_LbK[..., :, None] == forecast_LbK[..., None, :]).any(dim=-1).sum(dim=(0, 2))
