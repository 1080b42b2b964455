"""Which expert that nobody wants at present leaves its slot when room is needed. Pure."""

from collections.abc import Mapping

from odmoe_node.slots import Resting


def choose_victim(resting: Mapping[int, Resting]) -> int:
    """The slot whose expert was used longest ago, of those (at least one) that hold one nobody wants."""
    return min(resting, key=lambda slot: resting[slot].used_s)
