"""Stop strings in text that comes in pieces. Knows nothing of tokens.

Nothing that could still become a stop string is let out, so a stream never shows the beginning of one.
"""

from collections.abc import Sequence


class StopFilter:
    """Lets text through up to the first stop string, as if it looked after every character."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """What may be shown now that `text` has come; sets `stopped` when a stop string is complete."""
        if self.stopped or not self._stops:
            return "" if self.stopped else text
        self._held += text
        start = self._first_match()
        if start is not None:
            self.stopped = True
            shown, self._held = self._held[:start], ""
            return shown
        keep = self._possible_beginning()
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def flush(self) -> str:
        """What was held back, once it is known that no more text comes."""
        held, self._held = self._held, ""
        return held

    def _first_match(self) -> int | None:
        """Start of the stop string that is complete first, so that it does not matter how the text is cut."""
        matches = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        return min(matches)[1] if matches else None

    def _possible_beginning(self) -> int:
        """Length of the longest end of the held text which begins a stop string."""
        longest = min(len(self._held), max(map(len, self._stops)) - 1)
        for length in range(longest, 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
