"""Which experts are fetched before their layer's gate has spoken: those that the rules would have it load. Pure.

Top-score experts come first, which are all that SMoE fetches. Past the paper, low-score ones follow that nothing at
hand could stand in for: with small caches these are most of them, and each has to be loaded when its layer comes; left
out, hits fell as alpha grew. Whose prediction it is, the caller knows.
"""

from collections.abc import Collection, Sequence

from odmoe_server.importance.substitution import Choice, substitute, top_experts


def to_fetch(predicted: Sequence[Choice], *, at_hand: Collection[int], only_top: bool = False) -> list[int]:
    """Experts of one layer to load that are not at hand (in a slot, or on their way to one): top-score for any of the
    tokens, then, unless `only_top`, those that could not be replaced; the best scored first."""
    rank: dict[int, tuple[bool, float]] = {}
    swapped = substitute(predicted, at_hand=at_hand)
    for choice, swaps in zip(predicted, swapped, strict=True):
        tops = top_experts(choice)
        needed = tops if only_top else set(choice.experts).difference(swap.old for swap in swaps)
        for expert in needed.difference(at_hand):
            seen = rank.get(expert, (False, float("-inf")))
            rank[expert] = max(seen, (expert in tops, choice.scores[expert]))
    return sorted(rank, key=lambda expert: (not rank[expert][0], -rank[expert][1], expert))
