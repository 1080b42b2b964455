"""Keeps one bad sequence from ending the others: it is dropped, left alone until it starts anew, and reported.

Knows nothing of what is done for a sequence.
"""

import logging
from collections.abc import Callable
from typing import Final

from odmoe_predictor.mailbox import Mailbox

log = logging.getLogger(__name__)

MAX_BROKEN: Final = 4096


class Guard:
    """`drop` is called with a sequence that went wrong."""

    def __init__(self, mailbox: Mailbox, *, drop: Callable[[int], None]) -> None:
        self._mailbox = mailbox
        self._drop = drop
        self._broken: set[int] = set()

    def is_broken(self, sequence: int) -> bool:
        """Whether it went wrong since it last began."""
        return sequence in self._broken

    def begin_anew(self, sequence: int) -> None:
        """It begins, or ends, and what was is over."""
        self._broken.discard(sequence)

    def forget_all(self) -> None:
        """All sequences are over."""
        self._broken.clear()

    def run(self, sequence: int, job: Callable[[], None]) -> None:
        """Do something for a sequence; the server hears of it when that fails."""
        try:
            job()
        except ValueError as error:
            reason = str(error)
        except Exception as error:  # outermost: whatever torch or a model raises
            log.exception("the predictor failed on sequence %d", sequence)
            reason = f"sequence {sequence}: {type(error).__name__}"
        else:
            return
        self._give_up(sequence, reason)

    def attempt(self, job: Callable[[], None]) -> bool:
        """Do something for several sequences at once; whether it went well. If not, each has to be tried by itself, to
        see whose fault it was."""
        try:
            job()
        except Exception:  # outermost, as above
            log.exception("the predictor failed on several sequences at once")
            return False
        return True

    def _give_up(self, sequence: int, reason: str) -> None:
        if len(self._broken) < MAX_BROKEN:
            self._broken.add(sequence)
        self._drop(sequence)
        self._mailbox.complain(reason)
