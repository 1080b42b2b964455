"""Carries out the server's orders on the shadow, and says what it forecasts. Knows no sockets.

When alignments pile up, each still brings its rows, but only the newest of a sequence is forecast: the full model
has passed the others. Only where the shadow is to go on with its own token is the one before it forecast first. A
forecast under way is given up as soon as an alignment waits that the full model is past it, or that its token is
wrong. A sequence that went wrong is left alone until it starts anew.

With nothing else to do the shadow runs ahead: it goes on with its own next tokens, at most so many beyond the newest
aligned position. Forecasts made that way go out as any other. Where the token was wrong the position is forecast
again, and for a receiver the newer forecast of a position and layer takes the place of the older.
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
    """What became of the alignments that asked for a forecast; the times are those of finished forwards. `ahead`:
    positions forecast before they were aligned; `known`: those of them whose token was right when it came;
    `undone`: those whose was not."""

    forecast: int = 0
    ahead: int = 0
    known: int = 0
    undone: int = 0
    skipped: int = 0
    abandoned: int = 0
    failed: int = 0
    forecast_s: float = 0.0


class Worker:
    """Used by the one thread that computes; `run_ahead` is how many positions it may be ahead of the alignments."""

    def __init__(
        self, shadow: Shadow, mailbox: Mailbox, *, run_ahead: int = 0, clock: Callable[[], float] = monotonic
    ) -> None:
        self.counters = WorkerCounters()
        self._shadow = shadow
        self._mailbox = mailbox
        self._clock = clock
        # Spans that are aligned and not forecast yet, by sequence.
        self._wanted: dict[int, Span] = {}
        self._run_ahead = run_ahead
        # The last position each sequence may run ahead to.
        self._limits: dict[int, int] = {}
        self._broken: set[int] = set()

    def work(self) -> bool:
        """Carry out all orders that wait, then forecast what they ask for and run ahead; true if there was
        anything."""
        orders = self._mailbox.take()
        for order in orders:
            if isinstance(order, ForgetAll):
                self._wanted.clear()
                self._limits.clear()
                self._broken.clear()
                self._shadow.forget()
            else:
                self._guarded(order.message.sequence, partial(self._obey, order))
        while self._wanted:
            sequence = next(iter(self._wanted))
            span = self._wanted.pop(sequence)
            self._guarded(sequence, partial(self._forecast, span, is_stale=partial(self._is_stale, span)))
        for sequence in list(self._limits):
            self._guarded(sequence, partial(self._go_on, sequence))
        return bool(orders)

    def _obey(self, order: Order) -> None:
        message = order.message
        sequence = message.sequence
        if isinstance(message, Start | End):
            self._broken.discard(sequence)
        elif sequence in self._broken:
            return
        span = self._wanted.pop(sequence, None)
        if span is not None and isinstance(message, Align) and not message.tokens:
            self._forecast(span, is_stale=partial(self._is_over, sequence))
        elif span is not None:
            self.counters.skipped += 1
        self._limits.pop(sequence, None)
        match message:
            case Start():
                self._shadow.start(sequence)
            case Align():
                self._align(message, order.blobs)
            case Rollback():
                self._shadow.rollback(sequence, position=message.position)
            case End():
                self._shadow.end(sequence)
            case _:
                assert_never(message)

    def _align(self, message: Align, blobs: tuple[Blob, ...]) -> None:
        sequence, position = message.sequence, message.position
        was_ahead = self._shadow.length(sequence) > position
        asked = self._shadow.align(
            sequence,
            position=position,
            tokens=message.tokens,
            layers=message.cache,
            tensors=[from_blob(blob) for blob in blobs],
        )
        self.counters.known += asked == "known"
        self.counters.undone += asked == "forecast" and was_ahead
        span = Span(sequence, position, max(1, len(message.tokens)))
        if asked == "forecast":
            self._wanted[sequence] = span
        elif asked == "known":
            self._allow_ahead(span)

    def _forecast(self, span: Span, *, is_stale: Callable[[], bool]) -> None:
        if is_stale():
            self.counters.skipped += 1
        elif self._run(span, is_stale=is_stale):
            self.counters.forecast += 1
            self._allow_ahead(span)

    def _allow_ahead(self, span: Span) -> None:
        if self._run_ahead:
            self._limits[span.sequence] = span.position + span.length - 1 + self._run_ahead

    def _go_on(self, sequence: int) -> None:
        """Forecast the shadow's own next tokens, as far as allowed and while nobody wants anything else."""
        while self._shadow.length(sequence) <= self._limits[sequence] and not self._mailbox.has_orders:
            span = Span(sequence, self._shadow.length(sequence), 1)
            if self._shadow.go_on(sequence) != "forecast":
                return
            if not self._run(span, is_stale=partial(self._is_stale, span)):
                return
            self.counters.ahead += 1

    def _run(self, span: Span, *, is_stale: Callable[[], bool]) -> bool:
        """Feed the shadow what it remembers, whose newest tokens are the span's; False when it was given up."""
        began_s = self._clock()
        done = self._shadow.forecast(
            span.sequence,
            on_routing=lambda layer, experts: self._mailbox.publish(Forecast(span, layer, experts)),
            is_stale=is_stale,
        )
        if done:
            self.counters.forecast_s += self._clock() - began_s
        else:
            self.counters.abandoned += 1
        return done

    def _is_over(self, sequence: int) -> bool:
        """Whether something waits that ends the sequence as it is."""
        return self._mailbox.is_forgetting or not all(
            isinstance(message, Align) for message in self._mailbox.waiting(sequence)
        )

    def _is_stale(self, span: Span) -> bool:
        """Whether something waits that makes a forecast worth nothing."""
        if self._mailbox.is_forgetting:
            return True
        for message in self._mailbox.waiting(span.sequence):
            if not isinstance(message, Align):
                return True
            if not message.tokens:  # it needs what comes out of this one
                return False
            if message.position >= span.position + span.length or not self._agrees(message):
                return True
        return False

    def _agrees(self, align: Align) -> bool:
        """Whether the shadow took, or is to take, the tokens of an alignment by itself."""
        at = enumerate(align.tokens, align.position)
        return all(self._shadow.token_at(align.sequence, position) == token for position, token in at)

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
        self._limits.pop(sequence, None)
        if len(self._broken) < MAX_BROKEN:
            self._broken.add(sequence)
        self._shadow.end(sequence)
        self._mailbox.complain(reason)
