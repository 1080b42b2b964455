"""The tokens the predictor's shadow went on with, by sequence and position: drafts for the full model to verify. Pure.

A draft is a guess: whoever takes it asks the full model. Knows no socket, clock or thread, and nothing of experts.
"""

from itertools import count, islice, takewhile
from typing import Final

from odmoe_wire.messages import Rollback, Schedule

# More than the shadow may be ahead; the oldest go first.
MAX_POSITIONS: Final = 64
MAX_SEQUENCES: Final = 1024


class Drafts:
    """What was said last of each position; the newest `MAX_POSITIONS` of a sequence are remembered, of the
    `MAX_SEQUENCES` sequences last heard of."""

    def __init__(self) -> None:
        # Both in the order of when they were last heard of.
        self._tokens: dict[int, dict[int, int]] = {}

    def said(self, schedule: Schedule) -> bool:
        """A forecast came; whether it names the tokens it was made for."""
        span = schedule.span
        if not schedule.tokens:
            return False
        held = self._tokens[span.sequence] = self._tokens.pop(span.sequence, {})
        for position, token in enumerate(schedule.tokens, span.position):
            held.pop(position, None)
            held[position] = token
        while len(held) > MAX_POSITIONS:
            del held[next(iter(held))]
        while len(self._tokens) > MAX_SEQUENCES:
            del self._tokens[next(iter(self._tokens))]
        return True

    def rollback(self, message: Rollback) -> None:
        """What was said of the positions from there on was wrong."""
        held = self._tokens.get(message.sequence, {})
        for position in [at for at in held if at >= message.position]:
            del held[position]

    def forget(self, sequence: int) -> None:
        """The sequence is over."""
        self._tokens.pop(sequence, None)

    def clear(self) -> None:
        """The predictor is gone: another one's tokens do not follow on these."""
        self._tokens.clear()

    def after(self, sequence: int, position: int, most: int, *, behind: int | None = None) -> tuple[int, ...]:
        """The drafts known now for `position` and those that follow it without a gap, at most `most`. With `behind`,
        the token that in truth is at the position before: none, unless they were made behind that one."""
        held = self._tokens.get(sequence, {})
        if behind is not None and held.get(position - 1) != behind:
            return ()
        known = takewhile(lambda token: token is not None, map(held.get, count(position)))
        return tuple(token for token in islice(known, max(0, most)) if token is not None)
