"""One relationship with a side that welcomes us, as nodes and predictor have. Pure: `now` comes in as an argument.

Hello is said until the other welcomes us, a life sign each heartbeat from then on, and hello again when the
other is lost, leaves, or says that it does not know us. Knows no link and no slots.
"""

from enum import Enum, auto
from typing import Literal

from odmoe_wire.liveness import Liveness
from odmoe_wire.messages import AnyMessage, Bye, Refused, Welcome
from odmoe_wire.waiting import MAX_WAIT_S


class Standing(Enum):
    """Where we stand with the other side."""

    JOINING = auto()
    JOINED = auto()
    REFUSED = auto()


class Session:
    """`hello_every_s` is the pace of hellos; the pace of heartbeats is set by the welcome."""

    def __init__(self, *, hello_every_s: float, now: float) -> None:
        self.standing = Standing.JOINING
        self._hello_every_s = hello_every_s
        self._next_hello_s = now
        self._liveness: Liveness | None = None

    @property
    def is_joined(self) -> bool:
        """Whether we were welcomed and have not lost the other side since."""
        return self.standing is Standing.JOINED

    def heard(self, message: AnyMessage, now: float) -> None:
        """A message came from the other side."""
        if self._liveness is not None:
            self._liveness.heard(now)
        match message:
            case Welcome(heartbeat_s=heartbeat_s, lost_after_s=lost_after_s):
                if not self.is_joined:
                    self._liveness = Liveness(heartbeat_s, lost_after_s, now)
                    self.standing = Standing.JOINED
            case Refused():
                self.standing, self._liveness = Standing.REFUSED, None
            case Bye():
                self.rejoin(now)
            case _:
                pass

    def due(self, now: float) -> Literal["hello", "heartbeat"] | None:
        """What we have to say now; call `said` when it was sent, or could not be."""
        if self.standing is Standing.JOINING:
            return "hello" if now >= self._next_hello_s else None
        return "heartbeat" if self._liveness is not None and self._liveness.due(now) else None

    def said(self, now: float) -> None:
        """What was due has been seen to."""
        self._next_hello_s = now + self._hello_every_s
        if self._liveness is not None:
            self._liveness.said(now)

    def check_lost(self, now: float) -> bool:
        """True once when the other side has been silent too long; then we are joining again."""
        if self._liveness is None or not self._liveness.lost(now):
            return False
        self.rejoin(now)
        return True

    def wait_s(self, now: float) -> float:
        """How long nothing will be due."""
        if self._liveness is not None:
            return self._liveness.wait_s(now)
        if self.standing is Standing.REFUSED:
            return MAX_WAIT_S
        return max(0.0, self._next_hello_s - now)

    def rejoin(self, now: float) -> None:
        """Say hello again, at once."""
        self.standing = Standing.JOINING
        self._liveness = None
        self._next_hello_s = now
