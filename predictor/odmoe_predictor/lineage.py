"""Which token each forecast that is out was made for, so that it can be told which were made for a wrong one. Pure.

The shadow goes on with its own tokens; nodes and server only see forecasts of positions. Knows no shadow and no wire.
"""

from collections.abc import Callable


class Lineage:
    """Per sequence, the tokens of positions that were forecast, from the last aligned one on."""

    def __init__(self) -> None:
        self._tokens: dict[int, dict[int, int]] = {}

    def said(self, sequence: int, position: int, token: int) -> None:
        """A forecast of the position with this token goes out."""
        self._tokens.setdefault(sequence, {})[position] = token

    def aligned(self, sequence: int, position: int, token_at: Callable[[int], int | None]) -> int | None:
        """The full model has come to `position`, and `token_at` a position is the token that holds there now, if one
        is known: the first position whose forecast was made for another. What is out from there on is forgotten, and
        so is what lies before `position`."""
        out = self._tokens.get(sequence, {})
        later = sorted(at for at in out if at >= position)
        wrong = next((at for at in later if token_at(at) not in (None, out[at])), None)
        self._tokens[sequence] = {at: out[at] for at in later if wrong is None or at < wrong}
        return wrong

    def forget(self, sequence: int) -> None:
        """The sequence is over."""
        self._tokens.pop(sequence, None)

    def forget_all(self) -> None:
        """All sequences are over."""
        self._tokens.clear()
