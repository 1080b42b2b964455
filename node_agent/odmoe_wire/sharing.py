"""Which node serves an expert that several sequences are forecast to need at once: the one that was told of it first.

Placement "span" deals the experts of each forecast for itself, so two sequences could have one expert loaded twice.
Knows the forecasts, in the order in which the predictor sends them, and nothing else: predictor and server see the same
ones in the same order and so agree without a word. What one of them missed costs a load at most. Pure.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from odmoe_wire.messages import Member, Span
from odmoe_wire.placement import place

# Deals of a layer that are remembered: more than sequences step together, each some positions ahead.
MAX_DEALS = 256


class Sharing:
    """The deals of one view."""

    def __init__(self) -> None:
        # layer -> (sequence, position) -> expert -> node, in the order of the forecasts
        self._deals: dict[int, dict[tuple[int, int], dict[int, str]]] = {}

    def deal(
        self,
        span: Span,
        layer: int,
        experts: Iterable[int],
        members: Sequence[Member],
        *,
        group_size: int,
        num_layers: int,
    ) -> dict[int, str]:
        """Expert -> node id for a forecast, and remember it: what the same forecast had before stays where it was; what
        other sequences have been told since this one's last position is where they have it; the rest is dealt as by
        `place`, as far as that is even still."""
        deals = self._deals.setdefault(layer, {})
        before = deals.pop((span.sequence, span.position), {})
        known = _of_others(deals, span.sequence) | before
        dealt = place(layer, experts, members, group_size, num_layers)
        where = {expert: known[expert] for expert in dealt if expert in known}
        spare = Counter(dealt.values()) - Counter(where.values())
        for expert, node_id in dealt.items():
            if expert not in where:
                where[expert] = node_id if spare[node_id] else next(spare.elements())
                spare[where[expert]] -= 1
        deals[span.sequence, span.position] = where
        if len(deals) > MAX_DEALS:
            del deals[next(iter(deals))]
        return where

    def where(self, span: Span, layer: int) -> Mapping[int, str]:
        """What was dealt last for a span at a layer; empty if nothing was."""
        return self._deals.get(layer, {}).get((span.sequence, span.position), {})

    def clear(self) -> None:
        """Another view: all that was dealt is void."""
        self._deals.clear()


def _of_others(deals: dict[tuple[int, int], dict[int, str]], sequence: int) -> dict[int, str]:
    """What was dealt since the sequence's own last deal: sequences that step together are forecast in turns."""
    known: dict[int, str] = {}
    for (other, _), where in reversed(deals.items()):
        if other == sequence:
            break
        known = {**where, **known}
    return known
