"""Links: messages to named peers, and checked ones from them, over ZeroMQ. Knows no meaning of a message.

A link belongs to one thread. Nothing here blocks: a message that cannot be queued at once raises `PeerGone`.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import UnionType
from typing import Final, Protocol

import zmq

from odmoe_wire import endpoints
from odmoe_wire.checks import ProtocolError, is_peer_id
from odmoe_wire.codec import Blob, Decoder, Frame, Limits, Received, encode
from odmoe_wire.keys import ZAP_DOMAIN, CurveKeys, Gatekeeper, KeysError
from odmoe_wire.messages import AnyMessage, ProtocolErrorNotice

log = logging.getLogger(__name__)

DEFAULT_HWM: Final = 1000
# From this size on libzmq takes the sender's memory; copying a header or a row costs less than lending it.
ZERO_COPY_BYTES: Final = 65_536
# Bad messages skipped in one call of receive, and peers whose bad messages are told apart.
MAX_SKIPPED: Final = 64
MAX_OFFENDERS: Final = 1024
# As numbers: each operation on zmq's own makes an object of an enumeration, some thirty of them a message.
_POLLIN: Final = int(zmq.POLLIN)
_DONTWAIT: Final = int(zmq.DONTWAIT)
_DONTWAIT_MORE: Final = int(zmq.DONTWAIT | zmq.SNDMORE)


class PeerGone(Exception):
    """There is no route to the peer, or its queue is full: the message was not sent."""


class Link(Protocol):
    """Messages to and from named peers; see `RouterLink`, `DealerLink` and `loopback`."""

    @property
    def protocol_errors(self) -> int:
        """Bad messages that came, so far."""
        ...

    @property
    def bad_messages(self) -> Mapping[str, int]:
        """How many messages of each peer were not accepted; those of the first `MAX_OFFENDERS` that sent any."""
        ...

    @property
    def socket(self) -> "zmq.Socket[bytes] | None":
        """What `waiting.wait` polls; None when there is nothing to poll."""
        ...

    def send(self, peer: str, message: AnyMessage, *, epoch: int, blobs: Sequence[Blob] = ()) -> None:
        """Queue a message; raises `PeerGone` when the peer cannot be reached or its queue is full."""
        ...

    def receive(self) -> tuple[str, Received] | None:
        """The next good message and who sent it, or None. Bad ones are counted and skipped."""
        ...

    def close(self) -> None:
        """Drop what is queued and give the address back; may be called twice."""
        ...


class Offences:
    """Counts bad messages by peer and says which are worth a word: the first, second, fourth, eighth ...

    Doubling keeps a flood out of the log, and two peers that cannot read each other's notices fall silent.
    """

    def __init__(self) -> None:
        self._count: dict[str, int] = {}

    @property
    def by_peer(self) -> Mapping[str, int]:
        """Bad messages of each peer."""
        return self._count

    def worth_a_word(self, peer: str) -> bool:
        """Count one more of this peer."""
        if peer not in self._count and len(self._count) >= MAX_OFFENDERS:
            return False
        count = self._count[peer] = self._count.get(peer, 0) + 1
        return count & (count - 1) == 0


class CheckedLink:
    """What every link does with what it receives: decode, check, and answer for bad messages."""

    def __init__(self, *, decoder: Decoder) -> None:
        self._decoder = decoder
        self._offences = Offences()
        self.protocol_errors = 0

    def send(self, peer: str, message: AnyMessage, *, epoch: int, blobs: Sequence[Blob] = ()) -> None:
        """Queue a message; see `Link.send`."""
        raise NotImplementedError

    @property
    def bad_messages(self) -> Mapping[str, int]:
        """See `Link.bad_messages`."""
        return self._offences.by_peer

    def _reject(self, peer: str, error: ProtocolError) -> None:
        """Count a bad message; now and then log it and tell the sender (epoch 0: a link knows no view)."""
        self.protocol_errors += 1
        if not self._offences.worth_a_word(peer):
            return
        log.warning("dropped a message from %r: %s", peer, error)
        if peer:
            with suppress(PeerGone):
                self.send(peer, ProtocolErrorNotice(reason=str(error)), epoch=0)


class _ZmqLink(CheckedLink):
    """What both kinds of socket share."""

    def __init__(self, socket: "zmq.Socket[bytes]", *, decoder: Decoder) -> None:
        super().__init__(decoder=decoder)
        self._socket = socket

    @property
    def socket(self) -> "zmq.Socket[bytes]":
        """What `waiting.wait` polls."""
        return self._socket

    def send(self, peer: str, message: AnyMessage, *, epoch: int, blobs: Sequence[Blob] = ()) -> None:
        """Queue a message; see `Link.send`."""
        frames = self._addressed(peer, encode(message, epoch=epoch, blobs=blobs))
        last = len(frames) - 1
        for i, frame in enumerate(frames):
            try:
                more = _DONTWAIT if i == last else _DONTWAIT_MORE
                self._socket.send(frame, more, copy=memoryview(frame).nbytes < ZERO_COPY_BYTES)
            except zmq.ZMQError as error:
                if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                    raise
                if 0 < i < last:
                    # The peer went in mid-message; libzmq drops frames until the message's last.
                    self._socket.send(b"", _DONTWAIT)
                raise PeerGone(f"{peer}: {error.strerror}") from None

    def receive(self) -> tuple[str, Received] | None:
        """The next good message; see `Link.receive`."""
        for _ in range(MAX_SKIPPED):
            # Asked first: that nothing is there is the usual end, and an exception for it costs twice as much.
            if not int(self._socket.getsockopt(zmq.EVENTS)) & _POLLIN:
                return None
            try:
                frames = [self._socket.recv(_DONTWAIT, copy=False)]
                while frames[-1].more:
                    frames.append(self._socket.recv(_DONTWAIT, copy=False))
            except zmq.Again:
                return None
            peer = ""
            try:
                peer = self._sender(frames)
                return peer, self._decoder.decode([frame.buffer for frame in frames])
            except ProtocolError as error:
                self._reject(peer, error)
        return None

    def close(self) -> None:
        """Drop what is queued and give the address back; may be called twice."""
        self._socket.close(linger=0)

    def _addressed(self, peer: str, frames: list[Frame]) -> list[Frame]:
        raise NotImplementedError

    def _sender(self, frames: list[zmq.Frame]) -> str:
        """Who sent this; leaves only the message's own frames in the list. May raise `ProtocolError`."""
        raise NotImplementedError


class RouterLink(_ZmqLink):
    """The side that binds and has many peers: each under the name it connected with or, with keys, under that of its
    key, whatever it calls itself. Then it is reached where its latest message came from, and before its first one
    nowhere; nobody can take the way to another."""

    endpoint: str
    _gatekeeper: Gatekeeper | None = None

    def __init__(self, socket: "zmq.Socket[bytes]", *, decoder: Decoder) -> None:
        super().__init__(socket, decoder=decoder)
        self._routes: dict[str, bytes] = {}  # no more than there are keys

    @classmethod
    def bind(
        cls,
        endpoint: str,
        *,
        context: "zmq.Context[zmq.Socket[bytes]]",
        accept: UnionType,
        limits: Limits,
        keys: CurveKeys | None = None,
        hwm: int = DEFAULT_HWM,
    ) -> "RouterLink":
        """Bind; `endpoint` of the link is the address in use. Raises `EndpointError` (taken, unknown, or open
        to other hosts without keys). `hwm` messages wait at most for each peer in each direction. With keys,
        one such link to a context."""
        endpoints.require_keys(endpoint, has_keys=keys is not None)
        socket = context.socket(zmq.ROUTER)
        link = cls(socket, decoder=Decoder(accept=accept, limits=limits))
        try:
            endpoints.configure(socket, endpoint, hwm=hwm, limits=limits)
            socket.affinity = 1  # the first I/O thread, where no name is looked up that matters to others
            socket.router_mandatory = True
            if keys is not None:
                link._admit_only(keys, context)
            else:
                socket.router_handover = True  # a peer that comes back is not to wait for its old connection's end
            link.endpoint = endpoints.bind(socket, endpoint)
        except (zmq.ZMQError, ValueError):
            link.close()
            raise
        return link

    def close(self) -> None:
        """Drop what is queued and give the address back; may be called twice."""
        super().close()
        if self._gatekeeper is not None:
            self._gatekeeper.stop()
            self._gatekeeper = None

    def _admit_only(self, keys: CurveKeys, context: "zmq.Context[zmq.Socket[bytes]]") -> None:
        self._gatekeeper = Gatekeeper(context, keys=keys)
        try:
            self._gatekeeper.start()
        except zmq.ZMQError as error:
            raise endpoints.EndpointError(f"cannot check keys twice in one context: {error.strerror}") from None
        self._socket.curve_server = True
        self._socket.curve_publickey = keys.public
        self._socket.curve_secretkey = keys.secret
        self._socket.zap_domain = ZAP_DOMAIN.encode()

    def _addressed(self, peer: str, frames: list[Frame]) -> list[Frame]:
        if self._gatekeeper is None:
            return [peer.encode(), *frames]
        if peer not in self._routes:
            raise PeerGone(f"{peer}: not heard of yet")
        return [self._routes[peer], *frames]

    def _sender(self, frames: list[zmq.Frame]) -> str:
        route = frames.pop(0)
        if self._gatekeeper is None:
            peer = route.bytes.decode("ascii", "replace")
        else:
            peer = str(route.get("User-Id"))
            self._routes[peer] = route.bytes
        if not is_peer_id(peer):
            raise ProtocolError("the peer gave no proper id")
        return peer


class DealerLink(_ZmqLink):
    """The side that connects: everything goes to and comes from one peer, and libzmq reconnects by itself."""

    _peer: str

    @classmethod
    def connect(
        cls,
        endpoint: str,
        *,
        identity: str,
        peer: str,
        context: "zmq.Context[zmq.Socket[bytes]]",
        accept: UnionType,
        limits: Limits,
        keys: CurveKeys | None = None,
        hwm: int = DEFAULT_HWM,
        io_thread: int = 0,
    ) -> "DealerLink":
        """Connect under the name `identity`, which with keys is the key's, to the side called `peer`, which need not
        be there yet: while it is not, `send` raises `PeerGone`. Raises ValueError (bad identity), `EndpointError` or
        `KeysError`.

        libzmq looks a host's name up in the I/O thread, and where nobody answers that takes seconds in which every
        link of that thread stands still. So each link of a process has an `io_thread` of its own, as far as the
        context (`endpoints.context`) has them."""
        if not is_peer_id(identity):
            raise ValueError(f"{identity!r} cannot name a peer: use 1 to 64 letters, digits, '.', '_' or '-'")
        endpoints.require_keys(endpoint, has_keys=keys is not None)
        if keys is not None and keys.name != identity:
            raise KeysError(f"{identity!r} cannot use the key of {keys.name!r}: a key's name is the peer's id")
        socket = context.socket(zmq.DEALER)
        link = cls(socket, decoder=Decoder(accept=accept, limits=limits))
        link._peer = peer
        try:
            endpoints.configure(socket, endpoint, hwm=hwm, limits=limits)
            socket.affinity = 1 << io_thread % int(context.get(zmq.IO_THREADS))
            socket.immediate = True
            if keys is None:
                socket.routing_id = identity.encode()
            else:
                socket.curve_serverkey = keys.public_key_of(peer)
                socket.curve_publickey = keys.public
                socket.curve_secretkey = keys.secret
            socket.connect(endpoint)
        except (zmq.ZMQError, ValueError):
            link.close()
            raise
        return link

    def _addressed(self, peer: str, frames: list[Frame]) -> list[Frame]:
        if peer != self._peer:
            raise PeerGone(f"this link leads to {self._peer}, not to {peer}")
        return frames

    def _sender(self, frames: list[zmq.Frame]) -> str:
        return self._peer
