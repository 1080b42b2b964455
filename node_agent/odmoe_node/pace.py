"""How long a compute is going to take, judged by the last one. Pure."""


class Pace:
    """Remembers the rows and seconds of the last compute of one expert."""

    def __init__(self) -> None:
        self._rows = 1
        self._s = float("inf")  # nothing is known yet

    def took(self, rows: int, seconds: float) -> None:
        """A compute has ended."""
        self._rows, self._s = max(rows, 1), seconds

    def at_most_s(self, rows: int) -> float:
        """Seconds another one should take at most: it is never dearer by the row, and fewer rows never take longer."""
        return self._s * max(1.0, rows / self._rows)
