"""A load into a slot as seen by a compute that does not wait for its end. Knows no links, slots or tensors' meaning.

The two may begin in either order, each on its own thread: whoever orders the load makes the `Arrival` before.
"""

import threading
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

PATIENCE_S = 60.0
"""A load that has been ordered begins within this, or something is badly wrong."""


class EndedEarlyError(RuntimeError):
    """The load that a compute came with did not bring the expert."""


@runtime_checkable
class ArrivingSlots(Protocol):
    """What a bank offers beside `SlotBank` if an expert's first stage can be computed before all of it is there."""

    def expect(self, slot: int) -> None:
        """A load into the slot has been ordered, and may begin from now on."""
        ...

    def rows_on_arrival(self, slot: int, x_NH: Tensor, runs: Sequence[int] = ()) -> tuple[Tensor, float]:
        """`SlotBank.rows` while the slot's load is ordered or under way, or when it has ended; and the seconds of it
        that were spent waiting for bytes. The same bits. Raises RuntimeError (EndedEarlyError among them)."""
        ...


class Arrival:
    """One load. `ended` may be waited for; it is set however the load ends."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self._began = threading.Event()
        self._is_whole = False
        self._fields: Mapping[str, Tensor] = {}
        self._end_s = 0.0

    def begin(self, fields: Mapping[str, Tensor], *, end_s: float) -> None:
        """The bytes of the `fields` are on their way, the last will be there at `end_s`."""
        self._fields, self._end_s = fields, end_s
        self._began.set()

    def end(self, *, is_whole: bool) -> None:
        """The load is over."""
        self._is_whole = is_whole
        self.ended.set()
        self._began.set()

    def under_way(self) -> tuple[Mapping[str, Tensor], float]:
        """What `begin` was told, once it was."""
        if not self._began.wait(PATIENCE_S):
            raise EndedEarlyError(f"the load has not begun for {PATIENCE_S:g} s")
        self.check()
        return self._fields, self._end_s

    def check(self) -> None:
        """Raises EndedEarlyError if the load is over and did not bring all."""
        if self.ended.is_set() and not self._is_whole:
            raise EndedEarlyError("the load failed or was broken off")
