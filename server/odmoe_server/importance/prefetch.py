"""Which experts are fetched before their layer's gate has spoken: predicted top-score ones that are in no slot. Pure.

Low-score experts are not worth a load: they can be replaced. Whose prediction it is, the caller knows.
"""

from collections.abc import Collection, Sequence

from odmoe_server.importance.substitution import Choice, top_experts


def to_fetch(predicted: Sequence[Choice], *, at_hand: Collection[int]) -> list[int]:
    """Experts of one layer to load, the best scored first: top-score for any of the tokens, and not at hand (in a slot,
    or on their way to one)."""
    best: dict[int, float] = {}
    for choice in predicted:
        for expert in top_experts(choice).difference(at_hand):
            best[expert] = max(best.get(expert, float("-inf")), choice.scores[expert])
    return sorted(best, key=lambda expert: (-best[expert], expert))
