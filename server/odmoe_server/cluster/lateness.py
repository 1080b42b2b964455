"""How long a compute may take before another node is asked: what such computes took lately, and how far they strayed
from it. Pure: knows neither nodes' state nor messages, and gets the time passed in.

The quiet part is short where answers come evenly (`least_s`) and grows with what strays, up to `most_s`: on a machine
that stands still for a tenth of a second now and then, a node that does so is not late. What counts is how the better
half of the nodes strays, so one slow node among several is late all the same.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import pow
from typing import Final

# A compute is late after this many times what such a compute has taken lately.
LATE_FACTOR: Final = 8.0
# And not before this many loads of each expert, which may all be missing where lately none was: one that is under way
# and cannot be broken off, its own, and one to spare.
LOADS: Final = 3.0
# A compute that took more than this many times what is typical, and more than so long, is no measure for others.
FAR_OFF: Final = 3.0
FAR_OFF_S: Final = 0.02
# The quiet part is this many times what answers strayed lately; that is forgotten by half each so many seconds.
STRAY_FACTOR: Final = 2.0
HALF_LIFE_S: Final = 3.0
# How much longer each further try waits. With 15 and 30 of 100 messages of all links lost, a token took up to 1.6 and
# 2.2 s of virtual time with this, up to 1.8 and 3.2 s with 2.
GROWTH: Final = 1.5
MOST_TRIES: Final = 16


@dataclass(kw_only=True)
class Lateness:
    """`least_s` and `most_s` bound the quiet part, `cap_s` the whole."""

    least_s: float
    most_s: float
    cap_s: float
    _typical_row_s: float = 0.0
    _typical_expert_s: float = 0.0
    _typical_load_s: float = 0.0
    # By node: how much later than expected answers came, at the worst, and when that was.
    _strayed: dict[str, tuple[float, float]] = field(default_factory=dict)

    def expected_s(self, num_experts: int, num_rows: int) -> float:
        """What a compute of so many experts and rows takes, as far as is known."""
        return self._typical_expert_s * num_experts + self._typical_row_s * num_rows

    def late_after_s(self, num_experts: int, num_rows: int, *, tries: int, now: float) -> float:
        """How long to wait for so many experts and rows in all at one node, after so many nodes that were asked before.
        Each further try waits longer, up to `most_s`: whether messages are lost or everyone is slow cannot be told, and
        the slow are not to be asked ever more."""
        quiet_s = min(self.most_s, self.quiet_s(now) * GROWTH ** min(tries, MOST_TRIES))
        loads_s = LOADS * self._typical_load_s * num_experts
        return min(self.cap_s, quiet_s + max(LATE_FACTOR * self.expected_s(num_experts, num_rows), loads_s))

    def quiet_s(self, now: float) -> float:
        """What is allowed beyond the multiple of what is expected."""
        if not self._strayed:  # nothing is known yet
            return self.most_s
        strayed = sorted(_faded(worst_s, at_s, now) for worst_s, at_s in self._strayed.values())
        return min(self.most_s, max(self.least_s, STRAY_FACTOR * strayed[(len(strayed) - 1) // 2]))

    def answered(self, node_id: str, *, took_s: float, expected_s: float, now: float) -> None:
        """An answer came so long after its compute was sent, in time or late, where so much was expected."""
        worst_s, at_s = self._strayed.get(node_id, (0.0, now))
        strayed_s = min(took_s - expected_s, self.most_s / STRAY_FACTOR)  # more would only be remembered for longer
        self._strayed[node_id] = max(_faded(worst_s, at_s, now), strayed_s), now

    def learn(self, num_experts: int, num_rows: int, *, compute_s: float, took_s: float) -> None:
        """What a compute took since the node could begin it, and how much of that was spent multiplying."""
        rest_s = max(0.0, took_s - compute_s) / max(1, num_experts)
        if not self._typical_expert_s:  # nothing is known yet: the first one says more than nothing does
            self._typical_expert_s = rest_s
        self._typical_row_s = _learned(self._typical_row_s, compute_s / max(1, num_rows))
        self._typical_expert_s = _learned(self._typical_expert_s, rest_s)

    def loaded(self, loads_s: Iterable[float]) -> None:
        """Loads took so long."""
        for load_s in loads_s:
            self._typical_load_s = _learned(self._typical_load_s or load_s, load_s)

    def forget(self, node_id: str) -> None:
        """It left."""
        self._strayed.pop(node_id, None)


def _faded(worst_s: float, at_s: float, now: float) -> float:
    return worst_s * pow(0.5, (now - at_s) / HALF_LIFE_S)


def _learned(typical_s: float, took_s: float) -> float:
    """The moving average after one more sample. One that is far off counts only so much: with one slow node among
    several, patience stays that for the others, and the slow one is late."""
    return typical_s + 0.1 * (min(took_s, max(FAR_OFF * typical_s, FAR_OFF_S)) - typical_s)
