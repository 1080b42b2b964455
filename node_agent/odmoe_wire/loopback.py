"""Links in memory: one process, one thread, virtual time, and faults on demand. Knows no sockets and no sleep.

Messages pass through the codec as on a real link. The same calls in the same order give the same deliveries,
so a test of failures is a plain function of its events. A connection exists as soon as both ends do.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
class _Faults:
    """What befalls messages from one peer to another."""

    delay_s: float = 0.0
    drop: Which = 0
    duplicate: Which = 0
    cut: bool = False


# What is under way in one direction: a heap of (arrival time, number of sending, frames).
_Way = list[tuple[float, int, list[Frame]]]


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
        self._faults: dict[tuple[str, str], _Faults] = {}
        self._routers: dict[str, LoopbackLink] = {}
        self._dealers: dict[tuple[str, str], LoopbackLink] = {}
        # By router, dealer and whether it goes to the router: a name may be both a router's and a dealer's.
        self._ways: dict[tuple[str, str, bool], _Way] = {}
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
        if (identity, peer) in self._dealers:
            self._dealers[identity, peer].close()
        decoder = Decoder(accept=accept, limits=limits)
        link = LoopbackLink(self, name=identity, peer=peer, decoder=decoder, hwm=hwm)
        self._dealers[identity, peer] = link
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
        self._faults[source, target] = _Faults(delay_s, drop, duplicate, cut)
        if cut:
            self._ways.pop((target, source, True), None)
            self._ways.pop((source, target, False), None)

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
        return min((way[0][0] for way in self._ways.values() if way), default=None)

    def _connected(self, link: "LoopbackLink", target: str) -> bool:
        """Whether the link is open and has a connection to `target`, open as well."""
        if link.peer is None:
            return self._routers.get(link.name) is link and (target, link.name) in self._dealers
        return self._dealers.get((link.name, link.peer)) is link and target == link.peer and target in self._routers

    def send(self, link: "LoopbackLink", target: str, message: AnyMessage, frames: Sequence[Frame]) -> None:
        """Called by a link: put a message under way, or not, as the faults have it."""
        faults = self._faults.setdefault((link.name, target), _Faults())
        if faults.cut or not self._connected(link, target):
            raise PeerGone(f"{target}: no route")
        key = (link.name, target, False) if link.peer is None else (target, link.name, True)
        way = self._ways.setdefault(key, [])
        if len(way) >= link.hwm:
            raise PeerGone(f"{target}: queue full")
        faults.drop, dropped = _befalls(faults.drop, message)
        faults.duplicate, doubled = _befalls(faults.duplicate, message)
        copies = 0 if dropped else 1 + doubled
        self.story.append(Sent(self.clock(), link.name, target, message, copies))
        for _ in range(copies):
            self._number += 1
            # Copied as a socket would, into memory the receiver may write to.
            received: list[Frame] = [memoryview(bytearray(frame)) for frame in frames]
            heapq.heappush(way, (self.clock() + faults.delay_s, self._number, received))

    def take(self, link: "LoopbackLink") -> tuple[str, list[Frame]] | None:
        """Called by a link: the earliest message that has arrived at it, with its sender."""
        if link.peer is None:
            ways = [(dealer, way) for (router, dealer, up), way in self._ways.items() if up and router == link.name]
        else:
            ways = [(link.peer, self._ways.get((link.peer, link.name, False), []))]
        arrived = [(way[0][:2], source, way) for source, way in ways if way and way[0][0] <= self.clock()]
        if not arrived:
            return None
        _, source, way = min(arrived, key=lambda entry: entry[0])
        return source, heapq.heappop(way)[2]

    def forget(self, link: "LoopbackLink") -> None:
        """Called by a link that closes: drop what was on its way to it; what it sent is out already."""
        if link.peer is None:
            del self._routers[link.name]
            incoming = [key for key in self._ways if key[0] == link.name and key[2]]
        else:
            del self._dealers[link.name, link.peer]
            incoming = [(link.peer, link.name, False)]
        for key in incoming:
            self._ways.pop(key, None)


def _befalls(which: Which, message: AnyMessage) -> tuple[Which, bool]:
    """What is left of a fault after this message, and whether the message suffers it."""
    if callable(which):
        return which, which(message)
    return max(0, which - 1), which > 0


class LoopbackLink(CheckedLink):
    """One end: a router (`peer` None) or a dealer. Nothing to poll, so `waiting.wait` returns at once."""

    socket: Final = None

    def __init__(self, network: LoopbackNetwork, *, name: str, peer: str | None, decoder: Decoder, hwm: int) -> None:
        super().__init__(decoder=decoder)
        self.name, self.peer, self.hwm = name, peer, hwm
        self._network = network
        self._is_open = True

    def send(self, peer: str, message: AnyMessage, *, epoch: int, blobs: Sequence[Blob] = ()) -> None:
        """Queue a message; see `Link.send`."""
        self._network.send(self, peer, message, encode(message, epoch=epoch, blobs=blobs))

    def receive(self) -> tuple[str, Received] | None:
        """The next good message that has arrived; see `Link.receive`."""
        while self._is_open and (taken := self._network.take(self)) is not None:
            peer, frames = taken
            try:
                return peer, self._decoder.decode(frames)
            except ProtocolError as error:
                self._reject(peer, error)
        return None

    def close(self) -> None:
        """Leave the network; may be called twice."""
        if self._is_open:
            self._is_open = False
            self._network.forget(self)
