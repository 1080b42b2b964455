"""Substitution as the SMoE authors' published code does it where it departs from their paper, to be measured beside
the paper's rule; the product never serves by it. Pure. Written from a description of what that code does.

Candidates score strictly below S, so that the nearest one, the (k+1)-th expert, is never used; and they are walked in
the order of a set of small numbers, by index, instead of best scored first.
"""

from collections.abc import Collection, Sequence

from odmoe_server.importance.substitution import Choice, Swap, threshold, top_experts


def substitute_as_coded(choices: Sequence[Choice], *, at_hand: Collection[int]) -> list[tuple[Swap, ...]]:
    """As `substitution.substitute`, by the code's rule; `max_weight` is not known to it."""
    tops = [top_experts(choice) for choice in choices]
    found = []
    for number, choice in enumerate(choices):
        brought = set(at_hand).union(*(tops[other] for other in range(len(choices)) if other != number))
        missing = [expert for expert in choice.experts if expert not in tops[number] and expert not in brought]
        spare = _candidates(choice, brought)
        found.append(
            tuple(
                Swap(choice.experts.index(old), old, new)
                for old, new in zip(
                    sorted(missing, key=lambda expert: (choice.scores[expert], expert)), spare, strict=False
                )
            )
        )
    return found


def _candidates(choice: Choice, at_hand: set[int]) -> list[int]:
    best = threshold(choice)
    return sorted(
        expert
        for expert in at_hand.difference(choice.experts)
        if (1 - choice.alpha) * best < choice.scores[expert] < best
    )
