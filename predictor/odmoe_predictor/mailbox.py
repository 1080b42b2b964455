"""What passes between the thread that owns the sockets and the thread that forecasts. Both may call anything.

Orders go one way, in order; forecasts, what voids them and troubles the other. Knows what is queued, nothing of what
it means.
"""

import threading
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from odmoe_wire.codec import Blob
from odmoe_wire.messages import Align, End, Rollback, Routed, Span, Start
from odmoe_wire.waiting import Wake

# More means that the forecasts have stopped; a sequence whose order was refused starts anew.
MAX_ORDERS: Final = 1024
# As many at most may be corrections: one that is lost costs no more than its gain.
MAX_CORRECTIONS: Final = 256

OrderMessage = Start | Align | Routed | End


@dataclass(frozen=True)
class Order:
    """What the server wants done for one sequence, or says of it; `blobs` come with the message. A `Routed` for a
    shadow `corrects` the forecast of this layer; such an order may be taken before those that came earlier."""

    message: OrderMessage
    blobs: tuple[Blob, ...] = ()
    corrects: int | None = None

    @property
    def sequence(self) -> int:
        """The sequence it is about."""
        message = self.message
        return message.span.sequence if isinstance(message, Routed) else message.sequence


@dataclass(frozen=True)
class ForgetAll:
    """The server is gone, and its sequences with it."""


@dataclass(frozen=True)
class Forecast:
    """The experts of one layer for the tokens of a span, ascending; where it corrects an earlier one, `instead` of
    which. `tokens` are the span's, as far as they are to be told."""

    span: Span
    layer: int
    experts: list[int]
    instead: Sequence[int] = ()
    tokens: Sequence[int] = ()


# What receivers of forecasts hear, in order.
Word = Forecast | Rollback


class Mailbox:
    """`wake` is set whenever there is something for the side of the sockets."""

    def __init__(self, wake: Wake) -> None:
        self._wake = wake
        self._changed = threading.Condition()
        self._orders: deque[Order | ForgetAll] = deque()
        self._waiting: defaultdict[int, list[OrderMessage]] = defaultdict(list)
        self._num_corrections = 0
        self._forgetting = False
        self._words: deque[Word] = deque()
        self._troubles: deque[str] = deque()

    # --------------------------------------------------------------------------- the sockets' side

    def order(self, order: Order) -> bool:
        """Queue an order; False when too many wait already."""
        with self._changed:
            if len(self._orders) >= (MAX_ORDERS if order.corrects is None else MAX_CORRECTIONS):
                return False
            self._orders.append(order)
            if order.corrects is None:
                self._waiting[order.sequence].append(order.message)
            else:
                self._num_corrections += 1
            self._changed.notify_all()
        return True

    def forget_all(self) -> None:
        """Drop what waits in both directions and have every sequence forgotten."""
        with self._changed:
            self._orders.clear()
            self._waiting.clear()
            self._num_corrections = 0
            self._words.clear()
            self._troubles.clear()
            self._orders.append(ForgetAll())
            self._forgetting = True
            self._changed.notify_all()

    def words(self) -> list[Word]:
        """Take all forecasts and what voids them, oldest first."""
        with self._changed:
            taken = list(self._words)
            self._words.clear()
        return taken

    def troubles(self) -> list[str]:
        """Take all reports of sequences that went wrong."""
        with self._changed:
            taken = list(self._troubles)
            self._troubles.clear()
        return taken

    # ------------------------------------------------------------------------- the forecasting side

    def take(self) -> list[Order | ForgetAll]:
        """Take all orders, oldest first."""
        with self._changed:
            taken = list(self._orders)
            self._orders.clear()
            self._waiting.clear()
            self._num_corrections = 0
            self._forgetting = False
        return taken

    def take_corrections(self) -> list[Order]:
        """Take the orders that correct forecasts, oldest first, and leave the others."""
        if not self._num_corrections:
            return []
        with self._changed:
            taken = [order for order in self._orders if isinstance(order, Order) and order.corrects is not None]
            self._orders = deque(
                order for order in self._orders if isinstance(order, ForgetAll) or order.corrects is None
            )
            self._num_corrections = 0
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
        """What waits for a sequence, oldest first, but for what corrects forecasts."""
        with self._changed:
            return list(self._waiting.get(sequence, ()))

    def publish(self, word: Word) -> None:
        """Hand out a forecast, or void some, at once."""
        with self._changed:
            self._words.append(word)
        self._wake.set()

    def complain(self, reason: str) -> None:
        """A sequence went wrong and is not forecast any more."""
        with self._changed:
            self._troubles.append(reason)
        self._wake.set()
