"""Which expert is loaded next, into which slot, and which load in flight is broken off for it. Pure.

Knows slots, wants and needs; knows no messages. What a compute waits for goes first; then wants, in their order.

A load in flight is broken off when nobody wants it any more and something else waits; and when a compute waits for an
absent expert while a mere forecast is loaded. This comes to an end: what a compute waits for is never broken off, so
each need costs at most one load of a forecast, and a forecast the gate confirms becomes a need itself.
"""

from collections.abc import Iterator
from dataclasses import replace

from odmoe_node.counters import Counters
from odmoe_node.events import BreakOff, ExpertKey, StartLoad
from odmoe_node.eviction import Leaving, choose_victim
from odmoe_node.requests import RequestBook
from odmoe_node.slots import FREE, Loading, Ready, Resting, SlotTable
from odmoe_node.wants import Kind, Rank, WantBook

NEAR_THE_END = 0.25
"""Share of a load. With N groups a load has about N layers of time, so loading it anew is mostly hidden and the wait
for its end is not: a need waits for less than this only. In OD-MoE's testbed (section 7: loads of 4.4 layers, four
groups) the two cost the same at about a fifth."""


class Loader:
    """Fills the slots; at most `max_loading` loads run at a time."""

    def __init__(
        self, slots: SlotTable, *, wants: WantBook, requests: RequestBook, counters: Counters, max_loading: int
    ) -> None:
        self.max_loading = max_loading
        self.leaving: Leaving = {}
        self._slots = slots
        self._wants = wants
        self._requests = requests
        self._counters = counters
        self._typical_s: float | None = None

    def settle(self, now: float) -> Iterator[StartLoad | BreakOff]:
        """Start every load there is a link and a slot for, then clear the way of what is needed more."""
        while self._slots.num_loading < self.max_loading and (order := self._next_load(now)):
            yield order
        slot = self._in_the_way(now)
        if slot is not None:
            state = self._slots[slot]
            assert isinstance(state, Loading)
            self._slots.put(slot, replace(state, stopping=True))
            yield BreakOff(slot)

    def loaded(self, load_s: float) -> None:
        """A load ran to its end and took `load_s`."""
        self._counters.loaded(load_s)
        self._typical_s = load_s

    def stopped(self, slot: int, load_s: float) -> None:
        """The slot's load was broken off, `load_s` after it began."""
        state = self._slots[slot]
        assert isinstance(state, Loading), f"slot {slot} was not loading: {state}"
        assert state.stopping, f"slot {slot} was not told to stop: {state}"
        self._counters.loads_broken_off += 1
        self._counters.broken_off_s += load_s
        self._slots.put(slot, FREE)
        self._wants.requeue(state.key)

    def free(self, slot: int) -> None:
        """Take the expert out of its slot, which no load or compute is at work on."""
        state = self._slots[slot]
        assert isinstance(state, Ready | Resting), f"slot {slot} is busy: {state}"
        self._counters.loads_unused += not state.used
        self._slots.put(slot, FREE)
        self._wants.requeue(state.key)  # if anyone wants it still, it is loaded again in its turn

    def is_awaited(self) -> bool:
        """Whether the end of a load would let a compute or another load begin."""
        if self._requests.first_absent(self._slots) is not None:
            return True
        keys = []
        for state in self._slots.loading().values():
            if state.unwanted or state.stopping or self._requests.waited_for(state.key):
                return True
            keys.append(state.key)
        wanted = self._wants.first(resident=self._slots)
        if not self._slots.num_loading or wanted is None:
            return False
        if self._slots.any_free() is not None or self._slots.resting():
            return True
        ready = self._needed_last()
        ranks = [self._wants.rank(key) for key in keys] + ([] if ready is None else [ready[0]])
        return self._wants.rank(wanted) < max(ranks, default=self._wants.rank(wanted))

    # --------------------------------------------------------------------------------------------- insides

    def _next_load(self, now: float) -> StartLoad | None:
        """The load that is needed first; None when there is none or no slot for it."""
        absent = self._requests.first_absent(self._slots)
        if absent is not None:
            request, key = absent
            slot = self._room(before=None)
            on_demand = key.expert not in request.foreseen and not self._wants.wanted(key)
        else:
            wanted = self._wants.first(resident=self._slots)
            if wanted is None:
                return None
            key, on_demand = wanted, False
            slot = self._room(before=self._wants.rank(wanted))
        if slot is None:
            return None
        self._slots.put(slot, Loading(key, on_demand, began_s=now))
        return StartLoad(slot, key)

    def _room(self, *, before: Rank | None) -> int | None:
        """A free slot; else one whose expert nobody wants; else that of the expert needed last among those no compute
        waits for, with `before` only if it is needed later than that."""
        slot = self._slots.any_free()
        if slot is not None:
            return slot
        resting = self._slots.resting()
        if resting:
            victim = choose_victim(resting, self.leaving)
        else:
            last = self._needed_last()
            if last is None or (before is not None and last[0] <= before):
                return None
            victim = last[1]
        self._counters.evictions += 1
        self.free(victim)
        return victim

    def _needed_last(self) -> tuple[Rank, int] | None:
        """Of the experts in slots that are wanted, but waited for by no compute: (rank, slot) of the last."""
        candidates = [
            (self._wants.rank(state.key), slot)
            for slot in self._slots.occupied()
            if isinstance(state := self._slots[slot], Ready) and not self._requests.waited_for(state.key)
        ]
        return max(candidates, default=None)

    def _in_the_way(self, now: float) -> int | None:
        """The slot whose load should be broken off; one at a time."""
        # All bytes of a load that a compute has had are there; its end is about to be heard.
        loading = {slot: state for slot, state in self._slots.loading().items() if not state.used}
        if not loading or any(state.stopping for state in loading.values()):
            return None
        needed = self._requests.first_absent(self._slots) is not None
        if not needed and self._wants.first(resident=self._slots) is None:
            return None
        unwanted = next((slot for slot, state in loading.items() if state.unwanted), None)
        if unwanted is not None or not needed:
            return unwanted
        return next((slot for slot, state in loading.items() if self._gives_way(state, now)), None)

    def _gives_way(self, state: Loading, now: float) -> bool:
        """Whether a load in flight is broken off for the expert a compute waits for."""
        if self._requests.waited_for(state.key) or self._wants.rank(state.key)[0] is not Kind.FORECAST:
            return False
        near_its_end = (
            self._typical_s is not None and abs(now - state.began_s - self._typical_s) <= NEAR_THE_END * self._typical_s
        )
        return not (near_its_end and self._would_stay(state.key))

    def _would_stay(self, key: ExpertKey) -> bool:
        """Whether the need would take another slot than that of this load, once it has ended."""
        if self._slots.any_free() is not None or self._slots.resting():
            return True
        last = self._needed_last()
        return last is not None and last[0] > self._wants.rank(key)
