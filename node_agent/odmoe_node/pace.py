"""How long a compute is going to take, judged by the last one. Pure."""

from collections.abc import Sequence


class Pace:
    """Remembers the rows, runs and seconds of the last compute of one expert."""

    def __init__(self) -> None:
        self._rows = self._runs = 1
        self._s = float("inf")  # nothing is known yet

    def took(self, runs: Sequence[int], seconds: float) -> None:
        """A compute of so many rows in each run has ended."""
        self._rows, self._runs, self._s = sum(runs), len(runs), seconds

    def at_most_s(self, runs: Sequence[int]) -> float:
        """Seconds another one should take at most: it is never dearer by the row or the run, and fewer never take
        longer."""
        return self._s * max(1.0, sum(runs) / self._rows, len(runs) / self._runs)
