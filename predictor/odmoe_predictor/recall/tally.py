"""Recall as OD-MoE defines it: right experts over all experts needed, of everything and of each token index. Pure.

Shape suffixes: L MoE layers, b sequences, K experts a token, N token index in the answer.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Tally:
    """Of each token index: experts forecast rightly, and answers that have such a token; each needs `num_needed`."""

    hits_N: list[int]
    alive_N: list[int]
    num_needed: int

    @property
    def recall(self) -> float:
        """Of all tokens of all answers."""
        return sum(self.hits_N) / (self.num_needed * sum(self.alive_N))

    @property
    def curve(self) -> list[float]:
        """Of each token index."""
        return [hits / (self.num_needed * alive) for hits, alive in zip(self.hits_N, self.alive_N, strict=True)]


def num_hits_b(forecast_LbK: Tensor, needed_LbK: Tensor) -> Tensor:
    """How many of the needed experts of all layers were forecast, [b]; the experts of a token are all different."""
    return (needed_LbK[..., :, None] == forecast_LbK[..., None, :]).any(dim=-1).sum(dim=(0, 2))
