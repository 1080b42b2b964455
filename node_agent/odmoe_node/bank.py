"""The slots' memory, of fixed size: experts are brought into it and computed there.

Knows the store and the expert's maths; knows nothing of who wants which expert (`state`) or of messages. All
back ends have one interface, `SlotBank`; `open_bank` chooses.

Shape suffixes: N rows of one expert, H hidden size, B bytes of a record.
"""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from odmoe_model.experts import ExpertMaths
from odmoe_model.store import ExpertStore
from odmoe_node.bank_emulated import GIGABYTE, EmulatedBank
from odmoe_node.bank_sliced import open_sliced
from odmoe_node.memory import physical_bytes
from odmoe_node.pages import fetch_pages, page_forgetter
from odmoe_node.stopping import Stop, check

Device = Literal["auto", "cpu", "cuda", "emulated"]

log = logging.getLogger(__name__)


class SlotBank(Protocol):
    """`load` is called from one thread and `rows` from one other; never both for one slot at a time (but see
    `ArrivingSlots`, which a bank may be besides). `slot_bytes` is what a slot accounts for, and what a load into it
    brings."""

    record_bytes: int
    slot_bytes: int
    arena_bytes: int

    def load(self, slot: int, layer: int, expert: int, *, stop: Stop | None = None) -> float:
        """Bring an expert's record into the slot; returns the seconds it took. Raises OSError, RuntimeError, and
        BrokenOffError soon after `stop` is set."""
        ...

    def rows(self, slot: int, x_NH: Tensor, runs: Sequence[int] = ()) -> Tensor:
        """y_NH: the slot's expert on CPU rows, unweighted, back on the CPU. Each of the `runs`, which have so many
        rows each, gets the bits of a call of its own; without, all rows are one. Raises RuntimeError, and OSError where
        the store is looked at again."""
        ...


class CpuBank:
    """Slots in host memory. A slot holds its record as the store's own pages: a load brings in all of them, and the
    next load into the slot gives them back (`forget`), so that no more are held than `num_slots` records have.

    Measured here on 5.3 MB records in the page cache, one core: a load 0.16 ms, giving back 0.09 ms, and multiplying
    two rows 0.92 ms; with a copy into an arena of its own 0.74 ms and, as that leaves the weights in the cache, 0.59
    ms. Server and two nodes on one core: 4.1 tokens/s at one stream and 12.4 at eight, where copies gave 3.2 and 9.8.
    A copy would also hold what the page cache holds already.
    """

    CHUNK_BYTES = 4 << 20

    def __init__(self, store: ExpertStore, *, num_slots: int, forget: Callable[[Tensor], None]) -> None:
        self.record_bytes = self.slot_bytes = store.manifest.record_bytes
        self.arena_bytes = num_slots * self.record_bytes
        if self.arena_bytes > physical_bytes():
            raise MemoryError(f"this machine has {physical_bytes() / 1e6:.0f} MB")
        self._store = store
        self._forget = forget
        self._held: list[tuple[int, int] | None] = [None] * num_slots
        self._maths = ExpertMaths(store.manifest)
        self._maths.prepare_for_runs(store.fields(store.record(0, 0)))

    def load(self, slot: int, layer: int, expert: int, *, stop: Stop | None = None) -> float:
        """See `SlotBank.load`."""
        began_s = time.perf_counter()
        self._let_go(slot)
        # First: what came of a load that fails is given back by the next one.
        self._held[slot] = layer, expert
        record_B = self._store.record(layer, expert)
        for start in range(0, self.record_bytes, self.CHUNK_BYTES):
            check(stop)
            fetch_pages(record_B[start : start + self.CHUNK_BYTES])
        return time.perf_counter() - began_s

    @torch.inference_mode()
    def rows(self, slot: int, x_NH: Tensor, runs: Sequence[int] = ()) -> Tensor:
        """See `SlotBank.rows`. Raises OSError for a file that was cut short since the load."""
        held = self._held[slot]
        assert held is not None, f"slot {slot} holds nothing"
        record_B = self._store.record(*held)
        fetch_pages(record_B)
        return self._maths.rows(self._store.fields(record_B), x_NH, runs)

    def _let_go(self, slot: int) -> None:
        held, self._held[slot] = self._held[slot], None
        if held is not None and held not in self._held:
            self._forget(self._store.record(*held))


class CudaBank:
    """Slots in device memory. A load goes through two pinned buffers in turn, so that the copy into one
    overlaps the transfer out of the other, on a stream of its own.

    The load thread waits for its transfers, since their end is the news it brings. A slot is computed only
    between its load's end and the next load's start, so the two streams need not wait for each other.
    """

    CHUNK_BYTES = 4 << 20

    def __init__(self, store: ExpertStore, *, num_slots: int, forget: Callable[[Tensor], None]) -> None:
        self.record_bytes = self.slot_bytes = store.manifest.record_bytes
        self.arena_bytes = num_slots * self.record_bytes
        self._store = store
        self._forget = forget
        self._device = torch.device("cuda")
        arena_SB = torch.zeros(num_slots, self.record_bytes, dtype=torch.uint8, device=self._device)
        self._slots_B = list(arena_SB)
        self._fields = [store.fields(slot_B) for slot_B in self._slots_B]
        self._maths = ExpertMaths(store.manifest)
        self._copies = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        chunk_bytes = min(self.CHUNK_BYTES, self.record_bytes)
        self._staging = [torch.empty(chunk_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._sent = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]
        torch.cuda.current_stream(self._device).synchronize()

    def load(self, slot: int, layer: int, expert: int, *, stop: Stop | None = None) -> float:
        """See `SlotBank.load`."""
        began_s = time.perf_counter()
        record_B = self._store.record(layer, expert)
        chunk_bytes = self._staging[0].numel()
        try:
            with torch.cuda.stream(self._copies):
                for i, start in enumerate(range(0, self.record_bytes, chunk_bytes)):
                    check(stop)  # the next load comes on this stream, behind what was sent of this one
                    source = record_B[start : start + chunk_bytes]
                    fetch_pages(source)
                    staging, sent = self._staging[i % 2][: source.numel()], self._sent[i % 2]
                    sent.synchronize()  # the buffer's former content has gone out
                    staging.copy_(source)
                    self._slots_B[slot][start : start + chunk_bytes].copy_(staging, non_blocking=True)
                    sent.record(self._copies)
            self._copies.synchronize()
        finally:
            self._forget(record_B)
        return time.perf_counter() - began_s

    @torch.inference_mode()
    def rows(self, slot: int, x_NH: Tensor, runs: Sequence[int] = ()) -> Tensor:
        """See `SlotBank.rows`."""
        return self._maths.rows(self._fields[slot], x_NH.to(self._device), runs).cpu()


def open_bank(
    store: ExpertStore,
    *,
    num_slots: int,
    device: Device,
    link_gbps: float | None = None,
    budget_bytes: int | None = None,
) -> SlotBank:
    """A bank of `num_slots` slots; `link_gbps`, in gigabytes a second, is the emulated device's link, and for it
    alone. With a `budget_bytes` below one expert the one slot holds slices of it (`bank_sliced`). Raises ValueError
    when there is no such device or not so much memory, or when an expert cannot be sliced so small."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but torch sees no CUDA device: use --device cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    bytes_per_s = None if link_gbps is None else link_gbps * GIGABYTE
    if device == "emulated":
        log.info("slots are emulated: nothing is copied, a link of %g GB/s only takes its time", link_gbps)
    try:
        if budget_bytes is not None and budget_bytes < store.manifest.record_bytes:
            return open_sliced(store, budget_bytes=budget_bytes, device=device, bytes_per_s=bytes_per_s)
        bank = _open_whole(store, num_slots=num_slots, device=device, bytes_per_s=bytes_per_s)
    except (RuntimeError, MemoryError) as error:
        need_bytes = num_slots * store.manifest.record_bytes
        need_mb = min(need_bytes, budget_bytes or need_bytes) / 1e6
        message = f"no room for {num_slots} slots, {need_mb:.0f} MB together: use fewer ({error})"
        raise ValueError(message) from error
    log.info("slots: %d, %.1f MB together, device %s", num_slots, bank.arena_bytes / 1e6, device)
    return bank


def _open_whole(store: ExpertStore, *, num_slots: int, device: Device, bytes_per_s: float | None) -> SlotBank:
    if device == "emulated":
        assert bytes_per_s is not None, "the settings see to it"
        return EmulatedBank(store, num_slots=num_slots, bytes_per_s=bytes_per_s)
    return (CudaBank if device == "cuda" else CpuBank)(store, num_slots=num_slots, forget=page_forgetter())


def slots_within(budget_bytes: int, *, record_bytes: int) -> int:
    """How many slots a byte budget holds; below one expert it is one slot, for slices (`open_bank` says how small
    they may be)."""
    return max(1, budget_bytes // record_bytes)
