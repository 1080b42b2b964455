"""A node's loading lane in virtual time: one load after the other, each of which takes as long as it is told."""

from collections import deque
from collections.abc import Callable

from odmoe_node.lanes import Inbox, Job


class VirtualLane:
    """The job is done, at once, when its time is over; `end_due` has to be called again and again."""

    def __init__(self, inbox: Inbox, *, load_s: float, clock: Callable[[], float]) -> None:
        self._inbox, self._load_s, self._clock = inbox, load_s, clock
        self._jobs: deque[tuple[float, Job]] = deque()
        self._free_s = 0.0

    def submit(self, job: Job) -> None:
        self._free_s = max(self._free_s, self._clock()) + self._load_s
        self._jobs.append((self._free_s, job))

    def end_due(self) -> None:
        """End the loads whose time is over, to a microsecond."""
        while self._jobs and self._jobs[0][0] <= self._clock() + 1e-6:
            self._inbox.put(self._jobs.popleft()[1].event())

    def stop(self, *, timeout_s: float) -> bool:
        return True
