"""Which expert that nobody wants at present leaves its slot when room is needed. Pure.

Where the server keeps the scores (mode "importance") it says which go first; without its word the least recently used
one does.
"""

from collections.abc import Iterable, Mapping

from odmoe_node.events import ExpertKey
from odmoe_node.slots import Resting
from odmoe_wire.messages import ExpertRef

Leaving = Mapping[ExpertKey, int]
"""Experts that are to go first, each with its turn."""


def leaving_in_turn(refs: Iterable[ExpertRef]) -> Leaving:
    """What the server said, as `choose_victim` takes it."""
    return {ExpertKey(ref.layer, ref.expert): turn for turn, ref in enumerate(refs)}


def choose_victim(resting: Mapping[int, Resting], leaving: Leaving) -> int:
    """Of the slots (at least one) whose expert nobody wants: the one whose expert is to go first, else the one used
    longest ago."""
    last = len(leaving)
    return min(resting, key=lambda slot: (leaving.get(resting[slot].key, last), resting[slot].used_s))
