"""Many devices that serve the same texts side by side, each by its own policy: the lanes of one model.

An arm is one policy with so many slots, at one batch size and alpha. Arms that replace nothing share the lanes of the
reference, which runs as the gates say; each other arm has its own. A batch of one is as many devices as there are
texts; a batch of all texts is one device. Knows no times and no text.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from odmoe_server.bench.importance.device import Counts, Device, Features, Times
from odmoe_server.bench.importance.lanes import Gated
from odmoe_server.bench.importance.shortcuts import substitute_as_coded
from odmoe_server.importance.substitution import Choice, Likeness
from odmoe_server.importance.swapping import Routed, Served, choices_of, serve, swapped

# (layer, replaced expert, its substitute) -> how like they are.
LayerLikeness = Callable[[int, int, int], float]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A line of the record. `like`: substitutes are picked by likeness instead of by score; `as_coded`: as the
    authors' code picks them."""

    policy: str
    slots_share: float
    batch: int
    alpha: float
    features: Features
    like: LayerLikeness | None = field(default=None, compare=False)
    as_coded: bool = False


@dataclass(frozen=True, kw_only=True)
class _Unit:
    arm: Arm
    device: Device
    lanes: range
    texts: range


class Fleet:
    """All arms' devices; `decide` is a model's. The first `num_texts` lanes are the reference."""

    def __init__(
        self, arms: Sequence[Arm], *, num_texts: int, num_layers: int, num_experts: int, times: Times, normalised: bool
    ) -> None:
        self._units: list[_Unit] = []
        self._num_texts, self._normalised = num_texts, normalised
        self.lanes_of: dict[Arm, range] = {}
        self.num_lanes = num_texts
        for arm in arms:
            first = 0
            if arm.alpha > 0:
                first, self.num_lanes = self.num_lanes, self.num_lanes + num_texts
            self.lanes_of[arm] = range(first, first + num_texts)
            for text in range(0, num_texts, arm.batch):
                device = Device(
                    num_layers=num_layers,
                    num_experts=num_experts,
                    slots=round(arm.slots_share * num_layers * num_experts),
                    features=arm.features,
                    times=times,
                )
                texts = range(text, text + arm.batch)
                lanes = range(first + text, first + text + arm.batch)
                self._units.append(_Unit(arm=arm, device=device, lanes=lanes, texts=texts))

    def counts(self) -> dict[Arm, Counts]:
        """Of each arm, over its devices."""
        total: dict[Arm, Counts] = {}
        for unit in self._units:
            total[unit.arm] = total.get(unit.arm, Counts()) + unit.device.counts
        return total

    def prompt(self, gated: Gated) -> tuple[Tensor, Tensor]:
        """The texts' beginnings, text by text; nothing is replaced in a prompt."""
        scores, index = gated.scores.score_TE.tolist(), gated.index_TK.tolist()
        rows_each = len(scores) // self._num_texts
        for unit in self._units:
            rows = slice(unit.texts.start * rows_each, unit.texts.stop * rows_each)
            unit.device.gate(gated.layer, _mean(scores[rows]), is_prompt=True)
            unit.device.serve(gated.layer, _best(index[rows], scores[rows]))
        return gated.index_TK, gated.weight_TK

    def decide(self, gated: Gated) -> tuple[Tensor, Tensor]:
        """One token of each lane."""
        scores, gates = gated.scores.score_TE.tolist(), gated.index_TK.tolist()
        index_TK, weight_TK = gated.index_TK.clone(), gated.weight_TK.clone()
        for unit in self._units:
            rows = slice(unit.lanes.start, unit.lanes.stop)
            at_hand = unit.device.gate(gated.layer, _mean(scores[rows]))
            experts, replaced = gates[rows], 0
            if unit.arm.alpha > 0:
                served = self._served(unit.arm, gated, rows, at_hand)
                replaced = served.num_substituted
                if replaced:
                    index_TK[rows], weight_TK[rows] = served.index_TK, served.weight_TK
                    experts = served.index_TK.tolist()
            unit.device.replaced(chosen=sum(map(len, experts)), replaced=replaced)
            unit.device.serve(gated.layer, _best(experts, scores[rows]))
            if gated.ahead is not None and (unit.arm.features.prefetch or unit.arm.features.eviction == "forecast"):
                unit.device.foresee(gated.layer + 1, _ahead(gated, rows, unit.arm.alpha))
        return index_TK, weight_TK

    def _served(self, arm: Arm, gated: Gated, rows: slice, at_hand: Collection[int]) -> Served:
        routed = _routed(gated, rows, arm.alpha)
        if arm.as_coded:
            swaps = substitute_as_coded(choices_of(routed), at_hand=at_hand)
            return swapped(routed, tuple(swaps), self._normalised)
        likeness = _of_layer(arm.like, gated.layer)
        (served,) = serve([routed], at_hand=at_hand, normalised=self._normalised, likeness=likeness)
        return served


def _of_layer(like: LayerLikeness | None, layer: int) -> Likeness | None:
    return None if like is None else lambda old, new: like(layer, old, new)


def _routed(gated: Gated, rows: slice, alpha: float) -> Routed:
    scores = type(gated.scores)(gated.scores.score_TE[rows], gated.scores.weight_TE[rows])
    return Routed(index_TK=gated.index_TK[rows], weight_TK=gated.weight_TK[rows], scores=scores, alpha=alpha)


def _ahead(gated: Gated, rows: slice, alpha: float) -> list[Choice]:
    ahead = gated.ahead
    assert ahead is not None
    scores = type(ahead.scores)(ahead.scores.score_TE[rows], ahead.scores.weight_TE[rows])
    index_TK = ahead.index_TK[rows]
    return choices_of(Routed(index_TK=index_TK, weight_TK=index_TK, scores=scores, alpha=alpha))


def _mean(rows: Sequence[Sequence[float]]) -> Sequence[float]:
    return rows[0] if len(rows) == 1 else [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def _best(experts: Sequence[Sequence[int]], scores: Sequence[Sequence[float]]) -> Mapping[int, float]:
    """Each expert that is needed, with the best score any row gives it."""
    found: dict[int, float] = {}
    for row, row_scores in zip(experts, scores, strict=True):
        for expert in row:
            found[expert] = max(found.get(expert, float("-inf")), row_scores[expert])
    return dict(sorted(found.items()))
