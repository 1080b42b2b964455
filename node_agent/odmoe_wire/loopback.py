"""Links in memory: one process, one thread, virtual time, and faults on demand. Knows no sockets and no sleep.

Messages pass through the codec as on a real link. The same calls in the same order give the same deliveries, so a
test of failures is a plain function of its events. A connection exists as soon as both ends do.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import UnionType
from typing import Final

from odmoe_wire.checks import Limits, ProtocolError
from odmoe_wire.codec import Blob, Decoder, Frame, Received, encode
from odmoe_wire.link import DEFAULT_HWM, CheckedLink, PeerGone
from odmoe_wire.messages import AnyMessage

Which = int | Callable[[AnyMessage], bool]
ALL: Final[Which] = 1 << 62


class ManualClock:
    """Seconds that pass only when told to."""

    def __init__(self, *, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def __call__(self) -> float:
        """Now."""
        return self._now_s

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        if seconds < 0.0:
            raise ValueError(f"time does not go back by {seconds} s")
        self._now_s += seconds


@dataclass
class _Direction:
    """What is under way from one peer to another, and what befalls it. `pending` is a heap of (time, number)."""

    pending: list[tuple[float, int, list[Frame]]] = field(default_factory=list)
    delay_s: float = 0.0
    drop: Which = 0
    duplicate: Which = 0
    cut: bool = False


@dataclass(frozen=True)
class Sent:
    """One line of the network's story; `copies` is 0 for a message that was dropped."""

    at_s: float
    source: str
    target: str
    message: AnyMessage
    copies: int


class LoopbackNetwork:
    """Routers and dealers of one test, by name, and the faults between them."""

    def __init__(self, clock: ManualClock | None = None) -> None:
        self.clock = clock or ManualClock()
        self.story: list[Sent] = []
        self._directions: dict[tuple[str, str], _Direction] = {}
        self._routers: dict[str, LoopbackLink] = {}
        self._dealers: dict[tuple[str, str], LoopbackLink] = {}
        self._number = 0

    def router(self, name: str, *, accept: UnionType, limits: Limits, hwm: int = DEFAULT_HWM) -> "LoopbackLink":
        """A link as `RouterLink.bind` gives; one of that name must not be open."""
        if name in self._routers:
            raise ValueError(f"a router {name!r} is there already; close it first")
        link = LoopbackLink(self, name=name, peer=None, decoder=Decoder(accept=accept, limits=limits), hwm=hwm)
        self._routers[name] = link
        return link

    def dealer(
        self, identity: str, peer: str, *, accept: UnionType, limits: Limits, hwm: int = DEFAULT_HWM
    ) -> "LoopbackLink":
        """A link as `DealerLink.connect` gives; it takes the place of an older one of the same identity."""
        decoder = Decoder(accept=accept, limits=limits)
        link = LoopbackLink(self, name=identity, peer=peer, decoder=decoder, hwm=hwm)
        self._dealers[identity, peer] = link
        self._direction(peer, identity).pending.clear()
        return link

    def link_fault(
        self,
        source: str,
        target: str,
        *,
        delay_s: float = 0.0,
        drop: Which = 0,
        duplicate: Which = 0,
        cut: bool = False,
    ) -> None:
        """What befalls messages sent from `source` to `target` from now on; without faults, nothing any more.

        `drop` and `duplicate` name the next so many messages (`ALL`: every one) or those a predicate is true of.
        A dropped message was sent as far as the sender knows. `cut` loses what is under way and makes every
        `send` raise `PeerGone`.
        """
        direction = self._direction(source, target)
        direction.delay_s, direction.drop, direction.duplicate, direction.cut = delay_s, drop, duplicate, cut
        if cut:
            direction.pending.clear()

    def cut(self, one: str, other: str) -> None:
        """Cut both directions between two peers."""
        self.link_fault(one, other, cut=True)
        self.link_fault(other, one, cut=True)

    def heal(self, one: str, other: str) -> None:
        """End the faults of both directions between two peers."""
        self.link_fault(one, other)
        self.link_fault(other, one)

    def advance(self, seconds: float) -> None:
        """Let time pass; what has arrived by then can be received."""
        self.clock.advance(seconds)

    def next_delivery_s(self) -> float | None:
        """Time at which the earliest message under way arrives; None when nothing is."""
        return min((way.pending[0][0] for way in self._directions.values() if way.pending), default=None)

    def _direction(self, source: str, target: str) -> _Direction:
        return self._directions.setdefault((source, target), _Direction())

    def _is_open(self, link: "LoopbackLink") -> bool:
        if link.peer is None:
            return self._routers.get(link.name) is link
        return self._dealers.get((link.name, link.peer)) is link

    def _is_connected(self, link: "LoopbackLink", target: str) -> bool:
        """Whether `link` has a connection to `target` with both ends open."""
        if not self._is_open(link):
            return False
        return (target, link.name) in self._dealers if link.peer is None else target in self._routers

    def _send(self, link: "LoopbackLink", target: str, message: AnyMessage, frames: list[Frame]) -> None:
        way = self._direction(link.name, target)
        if way.cut or not self._is_connected(link, target):
            raise PeerGone(f"{target}: no route")
        if len(way.pending) >= link.hwm:
            raise PeerGone(f"{target}: queue full")
        way.drop, dropped = _befalls(way.drop, message)
        way.duplicate, doubled = _befalls(way.duplicate, message)
        copies = 0 if dropped else 1 + doubled
        self.story.append(Sent(self.clock(), link.name, target, message, copies))
        for _ in range(copies):
            self._number += 1
            # Copied as a socket would, into memory the receiver may write to.
            received: list[Frame] = [memoryview(bytearray(frame)) for frame in frames]
            heapq.heappush(way.pending, (self.clock() + way.delay_s, self._number, received))

    def _take(self, link: "LoopbackLink") -> tuple[str, list[Frame]] | None:
        """The earliest message that has arrived at the link, with its sender."""
        if not self._is_open(link):
            return None
        arrived = [
            (way.pending[0][:2], source)
            for (source, target), way in self._directions.items()
            if target == link.name and source_fits(link, source, self._dealers)
            if way.pending and way.pending[0][0] <= self.clock()
        ]
        if not arrived:
            return None
        _, source = min(arrived)
        return source, heapq.heappop(self._directions[source, link.name].pending)[2]

    def _close(self, link: "LoopbackLink") -> None:
        """Forget the link and what was on its way to it; what it sent is out already."""
        if not self._is_open(link):
            return
        if link.peer is None:
            del self._routers[link.name]
        else:
            del self._dealers[link.name, link.peer]
        for (source, target), way in self._directions.items():
            if target == link.name and link.peer in (None, source):
                way.pending.clear()
