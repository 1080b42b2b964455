"""Stop strings in text that comes in pieces. Knows nothing of tokens.

Nothing that could still become a stop string is let out, so a stream never shows the beginning of one.
"""

from collections.abc import Sequence


class StopFilter:
    """Lets text through up to the first stop string, as if it looked after every character; with `include` the stop
    string is shown, too. `stopped_by` is that string, once it has come."""

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self.stopped_by: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string is complete."""
        return self.stopped_by is not None

    def push(self, text: str) -> str:
        """What may be shown now that `text` has come."""
        if self.stopped or not self._stops:
            return "" if self.stopped else text
        self._held += text
        found = self._first_match()
        if found is not None:
            start, self.stopped_by = found
            shown, self._held = self._held[: start + len(self.stopped_by) * self._include], ""
            return shown
        keep = self._possible_beginning()
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def flush(self) -> str:
        """What was held back, once it is known that no more text comes."""
        held, self._held = self._held, ""
        return held

    def _first_match(self) -> tuple[int, str] | None:
        """The stop string that is complete first and its start, so that it does not matter how the text is cut."""
        matches = [(at + len(stop), at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        return min(matches)[1:] if matches else None

    def _possible_beginning(self) -> int:
        """Length of the longest end of the held text which begins a stop string."""
        longest = min(len(self._held), max(map(len, self._stops)) - 1)
        for length in range(longest, 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
