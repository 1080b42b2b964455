"""A slot bank for benchmarks on machines without accelerators: loads take the time of a link, and no work of the CPU.

Knows the time a record takes on a link of a given speed; knows nothing of who wants which expert. Nothing is copied:
a slot lends out the store's own pages, because a copy by the CPU would charge the node for what a DMA engine does.
"""

import ctypes
import mmap
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from odmoe_model.experts import ExpertMaths
from odmoe_model.store import ExpertStore
from odmoe_node.arrival import Arrival
from odmoe_node.stopping import BrokenOffError, Stop, wait_for

GIGABYTE = 1_000_000_000
_PR_SET_TIMERSLACK = 29


class LinkTime:
    """When transfers over one link end: one at a time, in the order they are asked for. Pure."""

    def __init__(self, *, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_s = float("-inf")

    def end_s(self, num_bytes: int, now: float) -> float:
        """The end of a transfer that is asked for now; the link is taken until then."""
        self._free_s = max(now, self._free_s) + self.part_s(num_bytes)
        return self._free_s

    def part_s(self, num_bytes: int) -> float:
        """How long so many bytes of a transfer take."""
        return num_bytes / self._bytes_per_s

    def break_off(self, now: float) -> None:
        """Whatever is or will be on its way is not any more: the link is free."""
        self._free_s = min(now, self._free_s)


class EmulatedLink(LinkTime):
    """The same, lived through: whoever wants bytes carried sleeps as long as that would take."""

    def __init__(
        self,
        *,
        bytes_per_s: float,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[Stop, float], bool] = wait_for,
    ) -> None:
        super().__init__(bytes_per_s=bytes_per_s)
        self._clock, self._sleep = clock, sleep
        self._precise = threading.local()

    def carry(self, num_bytes: int, *, stop: Stop | None = None) -> None:
        """Sleep until the link would have brought so many bytes. Raises BrokenOffError if `stop` is set meanwhile."""
        self.await_end(self.ask(num_bytes), stop=stop)

    def ask(self, num_bytes: int) -> float:
        """Begin a transfer as soon as the link is free; returns when it will end."""
        return self.end_s(num_bytes, self._clock())

    def await_end(self, end_s: float, *, stop: Stop | None = None) -> None:
        """Sleep until the end of a transfer; see `carry`."""
        if self.sleep_until(end_s, stop or threading.Event()):
            self.break_off(self._clock())
            raise BrokenOffError

    def sleep_until(self, until_s: float, flag: Stop) -> bool:
        """Sleep until then, or until the flag is set; whether it cut the sleep short."""
        self._sleep_precisely()
        while (left_s := until_s - self._clock()) > 0:
            if self._sleep(flag, left_s):
                return True
        return False

    def _sleep_precisely(self) -> None:
        """Once in each thread: let the kernel wake it on time, not up to 50 microseconds later (Linux)."""
        if not getattr(self._precise, "is_set", False):
            self._precise.is_set = True
            if sys.platform == "linux":
                ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(1), 0, 0, 0)


class _Load(NamedTuple):
    """One transfer: what it brings, and when it began and ends."""

    fields: dict[str, Tensor]
    began_s: float
    end_s: float


class EmulatedBank:
    """Slots on a device that is not there, behind a link of `bytes_per_s`; the interface is `SlotBank`'s.

    All records are touched once at the start, so that no page fault is charged to a computation. They stay in this
    process's page tables, hence its resident set shows the whole store, while `arena_bytes` says what a device
    would hold.

    Measured here on records of 5.3 MB at 2 GB/s, on an otherwise idle core: a load of 2.65 ms ends 0.04 ms late and
    takes 0.05 ms of the CPU, if it sleeps; that it waits for a flag which may break it off costs some 0.02 ms more of
    either. What it is late is told, and the next load begins after it.
    """

    def __init__(
        self,
        store: ExpertStore,
        *,
        num_slots: int,
        bytes_per_s: float,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[Stop, float], bool] = wait_for,
    ) -> None:
        self.record_bytes = self.slot_bytes = store.manifest.record_bytes
        self.arena_bytes = num_slots * self.record_bytes
        self._store = store
        self._link = EmulatedLink(bytes_per_s=bytes_per_s, clock=clock, sleep=sleep)
        self._clock = clock
        self._slots: list[dict[str, Tensor] | None] = [None] * num_slots
        self._arrivals = [Arrival() for _ in range(num_slots)]
        self._loads = [_Load({}, 0.0, 0.0)] * num_slots
        self._maths = ExpertMaths(store.manifest)
        self._maths.prepare_for_runs(store.fields(store.record(0, 0)))
        touch_records(store)

    def load(self, slot: int, layer: int, expert: int, *, stop: Stop | None = None) -> float:
        """See `SlotBank.load`: sleeps until the link would have brought the record."""
        self.begin(slot, layer, expert)
        try:
            self._link.await_end(self._loads[slot].end_s, stop=stop)
        except BrokenOffError:
            self.break_off(slot)
            raise
        self.finish(slot)
        return self._clock() - self._loads[slot].began_s

    def begin(self, slot: int, layer: int, expert: int) -> None:
        """See `TimedSlots.begin`."""
        began_s = self._clock()
        self._slots[slot] = None
        if self._arrivals[slot].ended.is_set():
            self.expect(slot)  # nobody else did: nobody computes before the end
        try:
            fields = self._store.fields(self._store.record(layer, expert))
        except BaseException:
            self._arrivals[slot].end(is_whole=False)
            raise
        self._loads[slot] = _Load(fields, began_s, self._link.ask(self.record_bytes))
        self._arrivals[slot].begin(fields, end_s=self._loads[slot].end_s)

    def left_s(self, slot: int) -> float:
        """See `TimedSlots.left_s`."""
        return self._loads[slot].end_s - self._clock()

    def finish(self, slot: int) -> float:
        """See `TimedSlots.finish`."""
        load = self._loads[slot]
        self._slots[slot] = load.fields  # not before: not all is there until the link has brought it
        self._arrivals[slot].end(is_whole=True)
        return load.end_s - load.began_s

    def break_off(self, slot: int) -> float:
        """See `TimedSlots.break_off`."""
        self._link.break_off(self._clock())
        self._arrivals[slot].end(is_whole=False)
        return self._clock() - self._loads[slot].began_s

    @torch.inference_mode()
    def rows(self, slot: int, x_NH: Tensor, runs: Sequence[int] = ()) -> Tensor:
        """See `SlotBank.rows`."""
        fields = self._slots[slot]
        assert fields is not None, f"slot {slot} holds nothing"
        return self._maths.rows(fields, x_NH, runs)

    def expect(self, slot: int) -> None:
        """See `ArrivingSlots.expect`."""
        self._arrivals[slot] = Arrival()

    @torch.inference_mode()
    def rows_on_arrival(self, slot: int, x_NH: Tensor, runs: Sequence[int] = ()) -> tuple[Tensor, float]:
        """See `ArrivingSlots.rows_on_arrival`. Bytes come in the record's order, as fast as the link brings them."""
        arrival, began_s = self._arrivals[slot], self._clock()
        fields, end_s = arrival.under_way()
        self._await_bytes(arrival, end_s - self._link.part_s(self.record_bytes - self._maths.up_bytes))
        waited_s = self._clock() - began_s
        h_NI = self._maths.up(fields, x_NH, runs)
        began_s = self._clock()
        self._await_bytes(arrival, end_s)
        waited_s += self._clock() - began_s
        return self._maths.down(fields, h_NI, runs), waited_s

    def _await_bytes(self, arrival: Arrival, until_s: float) -> None:
        """Sleep until then by itself: to be woken by the thread of the load would take longer."""
        self._link.sleep_until(until_s, arrival.ended)
        arrival.check()


def touch_records(store: ExpertStore) -> None:
    """Read one byte of every page of every record, so that all are in memory and in this process's page tables.
    Raises ValueError if there is not so much memory: then they would only push one another out."""
    manifest = store.manifest
    need_bytes = manifest.num_moe_layers * manifest.num_experts * manifest.record_bytes
    free_bytes = available_bytes()
    if free_bytes is not None and need_bytes > free_bytes:
        raise ValueError(
            f"device emulated keeps all experts in memory, {need_bytes / GIGABYTE:.1f} GB, but only "
            f"{free_bytes / GIGABYTE:.1f} GB are available: use a smaller model or --device cpu"
        )
    for layer in range(manifest.num_moe_layers):
        for expert in range(manifest.num_experts):
            store.record(layer, expert)[:: mmap.PAGESIZE].max()


def available_bytes() -> int | None:
    """Memory the system could give, what it keeps of files included; None where it does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            kilobytes = {name: value for name, _, value in (line.partition(":") for line in file)}
        return int(kilobytes["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return None
