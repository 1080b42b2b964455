"""Whose turn it is when several sequences want the shadow. Pure: no shadow, no wire.

First come those the full model is at, in the order in which they asked. Nobody runs ahead before; then it is the turn
of the one that is least far ahead, so that all get ahead evenly. A turn is one forward, of one token but where more
were asked for.
"""

from collections.abc import Mapping

from odmoe_wire.messages import Span


class Turns:
    """`run_ahead` is how many positions a sequence may be ahead of the newest the full model has come to."""

    def __init__(self, *, run_ahead: int) -> None:
        self._run_ahead = run_ahead
        # Spans that are aligned and not forecast yet, by sequence, oldest first.
        self._wanted: dict[int, Span] = {}
        # The last position each sequence may run ahead to.
        self._limits: dict[int, int] = {}

    def want(self, span: Span) -> None:
        """The full model is at the span."""
        self._wanted[span.sequence] = span

    def allow_ahead(self, span: Span) -> None:
        """What the full model is at is forecast: beyond it the sequence may run ahead."""
        if self._run_ahead:
            self._limits[span.sequence] = span.position + span.length - 1 + self._run_ahead

    def wanted(self) -> list[Span]:
        """What the full model waits for, oldest first."""
        return list(self._wanted.values())

    def take(self, sequence: int) -> Span:
        """It is the turn of a wanted span."""
        return self._wanted.pop(sequence)

    def ahead(self, lengths: Mapping[int, int]) -> list[int]:
        """Sequences that may run ahead, by how many positions they have: the one least far ahead first."""
        room = {sequence: limit - lengths[sequence] for sequence, limit in self._limits.items() if sequence in lengths}
        return sorted((sequence for sequence in room if room[sequence] >= 0), key=room.__getitem__, reverse=True)

    def stop(self, sequence: int) -> Span | None:
        """The sequence is over, or something new came for it: no turns are left. What was wanted of it."""
        self._limits.pop(sequence, None)
        return self._wanted.pop(sequence, None)

    def stop_all(self) -> None:
        """All sequences are over."""
        self._wanted.clear()
        self._limits.clear()
