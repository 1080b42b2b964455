"""Loads that need no thread: a device carries them out by itself, and the loop asks when they end.

Knows the seconds they have left; knows no links, and not who wants which expert. A thread that only sleeps until a
load's end costs the loop more than the load does: each hands the interpreter to the other (measured here beside eight
nodes on one core: see `tests/bench/results`).
"""

import logging
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from odmoe_node.events import Event, LoadBroke, LoadDone, LoadStopped, StartLoad

log = logging.getLogger(__name__)


@runtime_checkable
class TimedSlots(Protocol):
    """What a bank offers beside `SlotBank` if it knows when a load ends, and need not be watched meanwhile."""

    def begin(self, slot: int, layer: int, expert: int) -> None:
        """Start to bring a record into a slot; raises as `SlotBank.load` does."""
        ...

    def left_s(self, slot: int) -> float:
        """Until the slot's load ends; nothing or less when it has."""
        ...

    def finish(self, slot: int) -> float:
        """The load has ended: the slot holds the record from now on. Returns the seconds it took, however long ago it
        ended."""
        ...

    def break_off(self, slot: int) -> float:
        """The load shall not go on: the slot holds nothing. Returns the seconds since it began."""
        ...


class TimedLoads:
    """The loads under way in a bank of `TimedSlots`, oldest first. `clock` dates the ends."""

    def __init__(self, bank: TimedSlots, *, clock: Callable[[], float]) -> None:
        self._bank = bank
        self._clock = clock
        self._under_way: list[int] = []

    def begin(self, order: StartLoad) -> Event | None:
        """Start one; the event of its failure if it cannot be."""
        try:
            self._bank.begin(order.slot, *order.key)
        except Exception as error:  # the outermost frame of a load: it becomes an answer to whoever asked
            log.exception("a load failed")
            return LoadBroke(order.slot, f"{type(error).__name__}: {error}"[:500])
        self._under_way.append(order.slot)
        return None

    def break_off(self, slot: int) -> Event | None:
        """End one before its time; None if it has ended already."""
        if slot not in self._under_way:
            return None
        self._under_way.remove(slot)
        return LoadStopped(slot, self._bank.break_off(slot))

    def left_s(self, slot: int | None = None) -> float | None:
        """Until the load of the slot ends, or the first of all; None if none is under way."""
        slots = self._under_way if slot is None else [slot]
        return min(map(self._bank.left_s, slots), default=None)

    def take(self) -> Event | None:
        """The end of a load, if one has come."""
        for slot in self._under_way:
            left_s = self._bank.left_s(slot)
            if left_s <= 0:
                self._under_way.remove(slot)
                return LoadDone(slot, self._bank.finish(slot), self._clock() + left_s)
        return None
