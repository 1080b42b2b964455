"""Broken messages at every role's codec: so many of them, in so much time. Knows no sockets."""

import random
import time
from collections import Counter
from dataclasses import dataclass

from odmoe_wire import messages as m
from support.mutations import attempt, drawn

ROLES = {m.ToServer: "server", m.ToNode: "node", m.ToPredictor: "predictor"}
_LOOK_EVERY = 4096


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """`tried` by role, and how many of all were refused with a `ProtocolError`; the others were sound."""

    tried: Counter[str]
    refused: int
    took_s: float

    @property
    def total(self) -> int:
        """Messages in all."""
        return self.tried.total()


def run(*, count: int, seed: int, budget_s: float) -> Outcome:
    """Anything but a message or a `ProtocolError` is raised, with the seed and number of the message as a note."""
    dice = random.Random(seed)
    tried: Counter[str] = Counter()
    refused = 0
    began_s = time.monotonic()
    for number in range(count):
        if number % _LOOK_EVERY == 0 and time.monotonic() - began_s > budget_s:
            break
        frames, accept = drawn(dice)
        try:
            refused += attempt(frames, accept) is None
        except Exception as error:
            error.add_note(f"message {number} of seed {seed}, for the {ROLES[accept]}: {frames!r}")
            raise
        tried[ROLES[accept]] += 1
    return Outcome(tried=tried, refused=refused, took_s=time.monotonic() - began_s)
