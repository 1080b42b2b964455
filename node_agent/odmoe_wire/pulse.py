"""A life sign for whoever watches a process from outside: a file that is touched while it takes part in the cluster.

For health checks of processes that listen to nobody: the file's age tells. Knows one kind of message, and no role.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import zmq

from odmoe_wire.codec import Blob, Received
from odmoe_wire.link import Link
from odmoe_wire.messages import AnyMessage, Heartbeat

log = logging.getLogger(__name__)


class PulsingLink:
    """A link that touches `file` with each heartbeat that leaves; heartbeats go to a side that has taken us in."""

    def __init__(self, link: Link, *, file: Path) -> None:
        self._link = link
        self._file = file
        self._failed = False

    @property
    def protocol_errors(self) -> int:
        """See `Link`."""
        return self._link.protocol_errors

    @property
    def bad_messages(self) -> Mapping[str, int]:
        """See `Link`."""
        return self._link.bad_messages

    @property
    def socket(self) -> "zmq.Socket[bytes] | None":
        """See `Link.socket`."""
        return self._link.socket

    def send(self, peer: str, message: AnyMessage, *, epoch: int, blobs: Sequence[Blob] = ()) -> None:
        """See `Link.send`."""
        self._link.send(peer, message, epoch=epoch, blobs=blobs)
        if isinstance(message, Heartbeat):
            self._beat()

    def receive(self) -> tuple[str, Received] | None:
        """See `Link.receive`."""
        return self._link.receive()

    def close(self) -> None:
        """See `Link.close`; the file goes too."""
        self._link.close()
        with suppress(OSError):
            self._file.unlink(missing_ok=True)

    def _beat(self) -> None:
        try:
            self._file.touch()
            self._failed = False
        except OSError as error:
            if not self._failed:  # once is enough: a full disk must not fill the log
                log.warning("cannot touch the health file %s: %s", self._file, error.strerror)
            self._failed = True
