"""What a node has done since its start, in numbers. Data only."""

from bisect import bisect_left
from dataclasses import dataclass, field

from odmoe_wire.messages import LOAD_BOUNDS_S


@dataclass(slots=True)
class Counters:
    """What happened since the start; these only grow."""

    loads: int = 0
    loads_failed: int = 0
    loads_cancelled: int = 0  # wants that ended before their load began: free of cost
    loads_broken_off: int = 0  # loads stopped midway, because something else needed their link or slot more
    evictions: int = 0  # experts that had to leave their slot for another
    loads_unused: int = 0  # loads whose expert left its slot without having been computed
    load_s: float = 0.0  # of whole loads
    broken_off_s: float = 0.0  # of the link's time spent on loads that were broken off
    compute_s: float = 0.0
    stale: int = 0  # messages of a former view or incarnation
    late_forecasts: int = 0
    overflowed: int = 0  # forecasts and loads there was no room to note
    duplicates: int = 0
    expired: int = 0
    load_counts: list[int] = field(default_factory=lambda: [0] * (len(LOAD_BOUNDS_S) + 1))  # whole loads by their time

    def loaded(self, load_s: float) -> None:
        """A load ran to its end."""
        self.loads += 1
        self.load_s += load_s
        self.load_counts[bisect_left(LOAD_BOUNDS_S, load_s)] += 1
