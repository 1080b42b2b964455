"""What passes between the thread that owns the sockets and the thread that owns the shadow. Both may call anything.

Orders go one way, in order; forecasts and troubles the other. Knows what is queued, nothing of what it means.
"""

import threading
from collections import defaultdict, deque
from dataclasses import dataclass
from typing import Final

from odmoe_wire.codec import Blob
from odmoe_wire.messages import Align, End, Rollback, Span, Start
from odmoe_wire.waiting import Wake

# More means that the shadow has stopped; a sequence whose order was refused starts anew.
MAX_ORDERS: Final = 1024

OrderMessage = Start | Align | Rollback | End


@dataclass(frozen=True)
class Order:
    """What the server wants done for one sequence; `blobs` come with an Align."""

    message: OrderMessage
    blobs: tuple[Blob, ...] = ()


@dataclass(frozen=True)
class ForgetAll:
    """The server is gone, and its sequences with it."""


@dataclass(frozen=True)
class Forecast:
    """The experts of one layer for the tokens of a span, ascending."""

    span: Span
    layer: int
    experts: list[int]


class Mailbox:
    """`wake` is set whenever there is something for the side of the sockets."""

    def __init__(self, wake: Wake) -> None:
        self._wake = wake
        self._changed = threading.Condition()
        self._orders: deque[Order | ForgetAll] = deque()
        self._waiting: defaultdict[int, list[OrderMessage]] = defaultdict(list)
        self._forgetting = False
        self._forecasts: deque[Forecast] = deque()
        self._troubles: deque[str] = deque()

    # --------------------------------------------------------------------------- the sockets' side

    def order(self, order: Order) -> bool:
        """Queue an order; False when too many wait already."""
        with self._changed:
            if len(self._orders) >= MAX_ORDERS:
                return False
            self._orders.append(order)
            self._waiting[order.message.sequence].append(order.message)
            self._changed.notify_all()
        return True

    def forget_all(self) -> None:
        """Drop what waits in both directions and have every sequence forgotten."""
        with self._changed:
            self._orders.clear()
            self._waiting.clear()
            self._forecasts.clear()
            self._troubles.clear()
            self._orders.append(ForgetAll())
            self._forgetting = True
            self._changed.notify_all()

    def forecasts(self) -> list[Forecast]:
        """Take all forecasts, oldest first."""
        with self._changed:
            taken = list(self._forecasts)
            self._forecasts.clear()
        return taken

    def troubles(self) -> list[str]:
        """Take all reports of sequences that went wrong."""
        with self._changed:
            taken = list(self._troubles)
            self._troubles.clear()
        return taken

    # ---------------------------------------------------------------------------- the shadow's side

    def take(self) -> list[Order | ForgetAll]:
        """Take all orders, oldest first."""
        with self._changed:
            taken = list(self._orders)
            self._orders.clear()
            self._waiting.clear()
            self._forgetting = False
        return taken

    def wait(self, *, timeout_s: float) -> None:
        """Sleep until there are orders, at most `timeout_s`."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._orders), timeout_s)

    @property
    def has_orders(self) -> bool:
        """Whether anything waits to be taken."""
        return bool(self._orders)

    @property
    def is_forgetting(self) -> bool:
        """Whether an order to forget every sequence waits."""
        return self._forgetting

    def waiting(self, sequence: int) -> list[OrderMessage]:
        """What waits for a sequence, oldest first."""
        with self._changed:
            return list(self._waiting.get(sequence, ()))

    def publish(self, forecast: Forecast) -> None:
        """Hand out a forecast at once."""
        with self._changed:
            self._forecasts.append(forecast)
        self._wake.set()

    def complain(self, reason: str) -> None:
        """A sequence went wrong and is not forecast any more."""
        with self._changed:
            self._troubles.append(reason)
        self._wake.set()
