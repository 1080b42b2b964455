"""Which of the gate's experts are replaced by others, and by which (SMoE section IV). Pure: no tensor, no clock.

S is the best score among the experts the gate did not choose, the (k+1)-th of all. Of the chosen ones, those at
(1 + alpha) S or above are *top-score* and run whatever it costs; the others are *low-score*, and one of them that is
not at hand gives way to an expert at hand that scores above (1 - alpha) S. At hand is what lies in a slot, and what
another token of the step has as top-score, since it is brought anyway. Knows one layer of one step; where experts lie
and what a score is, the caller says.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

# How like one expert (first) another's outputs are (second); more is liker.
Likeness = Callable[[int, int], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What the gate says of one token: the `experts` it chose, by place; of every expert the `scores` they are ranked
    by (minus infinity where it may not be chosen) and the `weights` its output would have, in any unit. `alpha` 0
    replaces nothing. `max_weight`: share of the token's weight in this layer that may be replaced."""

    experts: tuple[int, ...]
    scores: Sequence[float]
    weights: Sequence[float]
    alpha: float
    max_weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Swap:
    """The expert at `place` among a token's experts, `old`, is replaced by `new`."""

    place: int
    old: int
    new: int


def substitute(
    choices: Sequence[Choice], *, at_hand: Collection[int], likeness: Likeness | None = None
) -> list[tuple[Swap, ...]]:
    """What is replaced for each token of one layer and step; the order of `choices` says which token is meant.

    `at_hand` are the experts of this layer in slots. The lowest scored go first, each for the best scored substitute
    that is left, or with `likeness` the likest; of equals the lower index wins."""
    tops = [top_experts(choice) for choice in choices]
    found = []
    for number, choice in enumerate(choices):
        brought = set(at_hand).union(*(tops[other] for other in range(len(choices)) if other != number))
        found.append(_swaps(choice, tops[number], brought, likeness))
    return found


def top_experts(choice: Choice) -> frozenset[int]:
    """The chosen experts that must run."""
    if choice.alpha <= 0:
        return frozenset(choice.experts)
    bar = (1 + choice.alpha) * threshold(choice)
    return frozenset(expert for expert in choice.experts if choice.scores[expert] >= bar)


def threshold(choice: Choice) -> float:
    """S: the best score among the experts the gate did not choose; below all others if there are none, or if it is no
    number the rule can be applied to (scores with a bias may be negative)."""
    chosen = set(choice.experts)
    best = max((score for expert, score in enumerate(choice.scores) if expert not in chosen), default=0.0)
    return best if best > 0 else float("-inf")


def _swaps(choice: Choice, top: frozenset[int], at_hand: set[int], likeness: Likeness | None) -> tuple[Swap, ...]:
    missing = [expert for expert in choice.experts if expert not in top and expert not in at_hand]
    missing.sort(key=lambda expert: (choice.scores[expert], expert))
    spare = _substitutes(choice, at_hand) if missing else []
    room = choice.max_weight * sum(choice.weights[expert] for expert in choice.experts)
    swaps = []
    for old in missing:
        room -= choice.weights[old]
        if not spare or room < -_ROUNDING:
            break
        new = spare[0] if likeness is None else max(spare, key=lambda expert: likeness(old, expert))
        spare.remove(new)
        swaps.append(Swap(choice.experts.index(old), old, new))
    return tuple(swaps)


def _substitutes(choice: Choice, at_hand: set[int]) -> list[int]:
    """Experts the gate did not choose and that may stand in, the best scored first."""
    bar = (1 - choice.alpha) * threshold(choice)
    able = [expert for expert in at_hand.difference(choice.experts) if choice.scores[expert] > bar]
    return sorted(able, key=lambda expert: (-choice.scores[expert], expert))


# Sums of weights are compared with a share of their sum.
_ROUNDING = 1e-6
