"""A slot bank with room for less than one expert: slices of it come and are computed one after the other.

Knows the store, the slices (`odmoe_model.slices`) and how they are carried (`slice_carriers`); knows nothing of who
wants which expert. The one slot's load brings the first slices; the others come during the computation, into the
buffer of a slice that has been computed, while the next one is. Results equal those of the whole expert within
rounding, not to the bit.

Shape suffixes: N rows of one expert, H hidden size, B bytes of a record.
"""

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

import torch
from torch import Tensor

from odmoe_model.slices import SlicedMaths, SlicePlan
from odmoe_model.store import ExpertStore
from odmoe_node.bank_emulated import EmulatedLink, touch_records
from odmoe_node.pages import page_forgetter
from odmoe_node.slice_carriers import CudaCarrier, EmulatedCarrier, HostCarrier, SliceCarrier
from odmoe_node.stopping import Stop

log = logging.getLogger(__name__)


class SlicedBank:
    """One slot of `plan.arena_bytes`; the interface is `SlotBank`'s.

    All that is carried is carried by one thread of the bank's own, in the order in which it was asked for. So a load
    never meets what a computation that broke off has ordered.
    """

    def __init__(
        self,
        store: ExpertStore,
        *,
        maths: SlicedMaths,
        plan: SlicePlan,
        carrier: SliceCarrier,
        forget: Callable[[Tensor], None],
    ) -> None:
        self.record_bytes = store.manifest.record_bytes
        self.arena_bytes = self.slot_bytes = plan.arena_bytes
        self._store, self._maths, self._plan = store, maths, plan
        self._carrier, self._forget = carrier, forget
        self._record_B = torch.empty(0, dtype=torch.uint8)
        self._fixed: Sequence[Tensor] = ()
        self._parts: list[Sequence[Tensor]] = [()] * plan.num_buffers
        self._held: list[int | None] = [None] * plan.num_buffers  # which slice each buffer holds
        # Said in the thread: a new one would take all cores for a copy.
        num_threads = torch.get_num_threads()
        self._thread = ThreadPoolExecutor(1, "slices", initializer=torch.set_num_threads, initargs=(num_threads,))

    def load(self, slot: int, layer: int, expert: int, *, stop: Stop | None = None) -> float:
        """See `SlotBank.load`; brings as many slices as there are buffers."""
        began_s = time.perf_counter()
        self._thread.submit(self._begin, layer, expert, stop).result()
        return time.perf_counter() - began_s

    @torch.inference_mode()
    def rows(self, slot: int, x_NH: Tensor, runs: Sequence[int] = ()) -> Tensor:
        """See `SlotBank.rows`; raises OSError too. Sums in float32 where the weights have fewer bits. All runs are
        computed while a slice is there."""
        x_on_device_NH = x_NH.to(self._carrier.device)
        wide = torch.promote_types(x_NH.dtype, torch.float32)
        y_NH = torch.zeros(x_NH.shape, dtype=wide, device=self._carrier.device)
        num_slices, num_buffers = len(self._plan.bounds), self._plan.num_buffers
        coming = [self._order(number) for number in range(num_buffers)]
        lengths = list(runs) or [x_NH.shape[0]]
        x_runs, y_runs = torch.split(x_on_device_NH, lengths), torch.split(y_NH, lengths)
        for number in range(num_slices):
            buffer = number % num_buffers
            coming[buffer].result()
            for x_RH, y_RH in zip(x_runs, y_runs, strict=True):
                y_RH.add_(self._maths.rows(self._parts[buffer], x_RH))
            self._carrier.used(buffer)
            if number + num_buffers < num_slices:
                coming[buffer] = self._order(number + num_buffers)
        for bias_H in self._fixed:
            y_NH += bias_H
        return y_NH.to(x_NH.dtype).cpu()

    # ------------------------------------------------------------------------------------- on the carrying thread

    def _begin(self, layer: int, expert: int, stop: Stop | None) -> None:
        self._held = [None] * self._plan.num_buffers
        self._record_B = self._store.record(layer, expert)
        fixed = self._maths.fixed(self._store.fields(self._record_B))
        self._fixed = self._carrier.bring(self._plan.num_buffers, fixed, stop=stop)
        for number in range(self._plan.num_buffers):
            self._bring(number, stop)

    def _order(self, number: int) -> "Future[None]":
        return self._thread.submit(self._bring, number)

    def _bring(self, number: int, stop: Stop | None = None) -> None:
        """Have the slice in its buffer, if it is not there already."""
        buffer = number % self._plan.num_buffers
        if self._held[buffer] == number:
            return
        self._held[buffer] = None
        sources = self._maths.cut(self._store.fields(self._record_B), *self._plan.bounds[number])
        try:
            self._parts[buffer] = self._carrier.bring(buffer, sources, stop=stop)
        finally:
            self._forget(self._record_B)
        self._held[buffer] = number


def open_sliced(
    store: ExpertStore,
    *,
    budget_bytes: int,
    device: Literal["auto", "cpu", "cuda", "emulated"],
    bytes_per_s: float | None,
) -> SlicedBank:
    """A bank within a budget that is below one expert; `bytes_per_s` is the emulated link's. Raises ValueError when
    the budget is below one slice, or the family's experts cannot be sliced, and RuntimeError without the memory."""
    maths = SlicedMaths(store.manifest)
    plan = maths.plan(budget_bytes)
    places_bytes = [*[plan.slice_bytes] * plan.num_buffers, plan.fixed_bytes]
    log.info(
        "an expert of %.1f MB does not fit %.1f MB: it is loaded and computed in %d slices, %d at a time, %.1f MB, "
        "device %s; results equal those of the whole within rounding",
        *(store.manifest.record_bytes / 1e6, budget_bytes / 1e6, len(plan.bounds), plan.num_buffers),
        *(plan.arena_bytes / 1e6, device),
    )
    if device == "emulated":
        assert bytes_per_s is not None, "the settings see to it"
        touch_records(store)
        carrier: SliceCarrier = EmulatedCarrier(EmulatedLink(bytes_per_s=bytes_per_s))
        return SlicedBank(store, maths=maths, plan=plan, carrier=carrier, forget=lambda record_B: None)
    carrier = (CudaCarrier if device == "cuda" else HostCarrier)(places_bytes)
    return SlicedBank(store, maths=maths, plan=plan, carrier=carrier, forget=page_forgetter())
