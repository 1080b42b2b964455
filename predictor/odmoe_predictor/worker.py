"""Carries out the server's orders on the shadow, and says what it forecasts. Knows no sockets.

When alignments pile up, each still brings its rows, but only the newest of a sequence is forecast: the full model
has passed the others. A forecast under way is given up as soon as something newer waits for its sequence. A
sequence that went wrong is left alone until it starts anew.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import Final, assert_never

from odmoe_model.tensors import from_blob
from odmoe_predictor.mailbox import Forecast, ForgetAll, Mailbox, Order
from odmoe_predictor.shadow import Shadow
from odmoe_wire.codec import Blob
from odmoe_wire.messages import Align, End, Rollback, Span, Start

log = logging.getLogger(__name__)

MAX_BROKEN: Final = 4096


@dataclass
class WorkerCounters:
    """What became of the alignments that asked for a forecast; the times are those of finished forwards."""

    forecast: int = 0
    skipped: int = 0
    abandoned: int = 0
    failed: int = 0
    forecast_s: float = 0.0


class Worker:
    """Used by the one thread that computes."""

    def __init__(self, shadow: Shadow, mailbox: Mailbox, *, clock: Callable[[], float] = monotonic) -> None:
        self.counters = WorkerCounters()
        self._shadow = shadow
        self._mailbox = mailbox
        self._clock = clock
        # Spans that are aligned and not forecast yet, by sequence.
        self._wanted: dict[int, Span] = {}
        self._broken: set[int] = set()

    def work(self) -> bool:
        """Carry out all orders that wait, then forecast what they ask for; true if there was anything."""
        orders = self._mailbox.take()
        for order in orders:
            if isinstance(order, ForgetAll):
                self._wanted.clear()
                self._broken.clear()
                self._shadow.forget()
            else:
                self._guarded(order.message.sequence, partial(self._obey, order))
        while self._wanted:
            sequence = next(iter(self._wanted))
            span = self._wanted.pop(sequence)
            if self._mailbox.is_superseded(sequence):
                self.counters.skipped += 1
            else:
                self._guarded(sequence, partial(self._forecast, span))
        return bool(orders)

    def _obey(self, order: Order) -> None:
        message = order.message
        if isinstance(message, Start | End):
            self._broken.discard(message.sequence)
        elif message.sequence in self._broken:
            return
        if self._wanted.pop(message.sequence, None) is not None:
            self.counters.skipped += 1
        match message:
            case Start():
                self._shadow.start(message.sequence)
            case Align():
                self._align(message, order.blobs)
            case Rollback():
                self._shadow.rollback(message.sequence, position=message.position)
            case End():
                self._shadow.end(message.sequence)
            case _:
                assert_never(message)

    def _align(self, message: Align, blobs: tuple[Blob, ...]) -> None:
        self._shadow.align(
            message.sequence,
            position=message.position,
            tokens=message.tokens,
            layers=message.cache,
            tensors=[from_blob(blob) for blob in blobs],
        )
        if message.tokens:
            self._wanted[message.sequence] = Span(message.sequence, message.position, len(message.tokens))

    def _forecast(self, span: Span) -> None:
        began_s = self._clock()
        done = self._shadow.forecast(
            span.sequence,
            on_routing=lambda layer, experts: self._mailbox.publish(Forecast(span, layer, experts)),
            is_stale=partial(self._mailbox.is_superseded, span.sequence),
        )
        if done:
            self.counters.forecast += 1
            self.counters.forecast_s += self._clock() - began_s
        else:
            self.counters.abandoned += 1

    def _guarded(self, sequence: int, job: Callable[[], None]) -> None:
        """One bad sequence must not end the others: it is dropped here, and the server hears of it."""
        try:
            job()
        except ValueError as error:
            reason = str(error)
        except Exception as error:  # outermost: whatever torch or a model raises
            log.exception("the shadow failed on sequence %d", sequence)
            reason = f"sequence {sequence}: {type(error).__name__}"
        else:
            return
        self.counters.failed += 1
        self._wanted.pop(sequence, None)
        if len(self._broken) < MAX_BROKEN:
            self._broken.add(sequence)
        self._shadow.end(sequence)
        self._mailbox.complain(reason)
