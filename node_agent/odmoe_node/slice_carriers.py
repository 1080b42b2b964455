"""How slices of experts come to where they are computed: host memory, a CUDA device, or the emulated device.

Each carrier owns an arena of a few places of fixed size, and knows nothing of experts, families or whose turn it is
(`bank_sliced`). All have one interface, `SliceCarrier`.

Shape suffixes: B bytes of a place.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from odmoe_model.manifest import align
from odmoe_node.bank_emulated import EmulatedLink
from odmoe_node.pages import fetch_pages
from odmoe_node.stopping import Stop, check


class SliceCarrier(Protocol):
    """`bring` is called from one thread; `used` from the one that computes, and never while its place is brought."""

    device: torch.device

    def bring(self, place: int, sources: Sequence[Tensor], *, stop: Stop | None = None) -> list[Tensor]:
        """Have the sources' contents in the place; returns them as they are there. Raises OSError, RuntimeError,
        and BrokenOffError soon after `stop` is set."""
        ...

    def used(self, place: int) -> None:
        """What was ordered of this thread's device so far is all that needs the place's present contents."""
        ...


def lay_out(place_B: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of the place for tensors of these shapes and types, one behind the other, each aligned."""
    ends = accumulate((align(tensor.nbytes) for tensor in like), initial=0)
    return [
        place_B[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for start, tensor in zip(ends, like, strict=False)
    ]


class HostCarrier:
    """Places in host memory; slices are copied out of the mapped file."""

    def __init__(self, places_bytes: Sequence[int]) -> None:
        self.device = torch.device("cpu")
        # Written once, so that the memory is really there before the first load asks for it.
        self.arena_B = torch.zeros(sum(places_bytes), dtype=torch.uint8)
        self._places_B = torch.split(self.arena_B, list(places_bytes))

    def bring(self, place: int, sources: Sequence[Tensor], *, stop: Stop | None = None) -> list[Tensor]:
        """See `SliceCarrier.bring`."""
        parts = lay_out(self._places_B[place], sources)
        for part, source in zip(parts, sources, strict=True):
            check(stop)
            fetch_pages(source)
            part.copy_(source)
        return parts

    def used(self, place: int) -> None:
        """See `SliceCarrier.used`: computations here have ended when they return."""


class CudaCarrier:
    """Places in device memory; slices are gathered in one pinned buffer, and what is gathered goes out on a stream of
    its own while the rest is gathered.

    The carrying thread waits for its transfers, so whoever computes after `bring` need not; the transfers wait on
    the device, not the host, for the computation that had the place before.
    """

    def __init__(self, places_bytes: Sequence[int]) -> None:
        self.device = torch.device("cuda")
        self.arena_B = torch.zeros(sum(places_bytes), dtype=torch.uint8, device=self.device)
        self._places_B = torch.split(self.arena_B, list(places_bytes))
        self._staging_B = torch.empty(max(places_bytes), dtype=torch.uint8, pin_memory=True)
        self._copies = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._used = [torch.cuda.Event() for _ in places_bytes]  # type: ignore[no-untyped-call]
        torch.cuda.current_stream(self.device).synchronize()

    def bring(self, place: int, sources: Sequence[Tensor], *, stop: Stop | None = None) -> list[Tensor]:
        """See `SliceCarrier.bring`."""
        parts = lay_out(self._places_B[place], sources)
        with torch.cuda.stream(self._copies):
            self._copies.synchronize()  # what was sent before a break-off has left the buffer
            self._copies.wait_event(self._used[place])
            for part, staged, source in zip(parts, lay_out(self._staging_B, sources), sources, strict=True):
                check(stop)
                fetch_pages(source)
                staged.copy_(source)
                part.copy_(staged, non_blocking=True)
        self._copies.synchronize()
        return parts

    def used(self, place: int) -> None:
        """See `SliceCarrier.used`."""
        self._used[place].record(torch.cuda.current_stream(self.device))


class EmulatedCarrier:
    """Places on a device that is not there: slices take the time of its link, the store's own pages are lent out."""

    def __init__(self, link: EmulatedLink) -> None:
        self.device = torch.device("cpu")
        self._link = link

    def bring(self, place: int, sources: Sequence[Tensor], *, stop: Stop | None = None) -> list[Tensor]:
        """See `SliceCarrier.bring`: sleeps until the link would have brought them."""
        self._link.carry(sum(source.nbytes for source in sources), stop=stop)
        return list(sources)

    def used(self, place: int) -> None:
        """See `SliceCarrier.used`: nothing here is overwritten."""
