"""Tells a rival of the shadow what the full model did, and hands out what it forecasts. Knows no sockets.

The server says which token a step takes (`Align`, without a cache) and then, layer by layer, what the gates chose
(`Routed`). When steps pile up the rival learns from all of them, but only what is forecast of the newest goes out. A
sequence that went wrong is left alone until it starts anew.
"""

from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from typing import Final, assert_never

from torch import Tensor

from odmoe_model.tensors import from_blob
from odmoe_predictor.guard import Guard
from odmoe_predictor.mailbox import Forecast, ForgetAll, Mailbox, Order
from odmoe_predictor.rivals.base import Forecasts, Rival
from odmoe_wire.messages import Align, End, Routed, Span, Start

MAX_SEQUENCES: Final = 64


@dataclass
class RivalCounters:
    """`forecast`: tokens; `skipped`: tokens and layers that were over before their turn came, or never began."""

    forecast: int = 0
    skipped: int = 0
    failed: int = 0


class RivalWorker:
    """Used by the one thread that forecasts. `max_sequences` bounds what is remembered: the one least recently told of
    goes first."""

    def __init__(self, rival: Rival, mailbox: Mailbox, *, max_sequences: int = MAX_SEQUENCES) -> None:
        self.counters = RivalCounters()
        self._rival = rival
        self._mailbox = mailbox
        self._max_sequences = max_sequences
        # Sequences that began, and the span of the step each is in.
        self._spans: OrderedDict[int, Span | None] = OrderedDict()
        self._guard = Guard(mailbox, drop=self._drop)

    def work(self) -> bool:
        """Carry out all orders that wait; true if there were any."""
        orders = self._mailbox.take()
        newest = {
            order.sequence: at
            for at, order in enumerate(orders)
            if isinstance(order, Order) and not isinstance(order.message, Routed)
        }
        for at, order in enumerate(orders):
            if isinstance(order, ForgetAll):
                self._forget_all()
            else:
                is_over = at < newest.get(order.sequence, 0)
                self._guard.run(order.sequence, partial(self._obey, order, is_over=is_over))
        return bool(orders)

    def _obey(self, order: Order, *, is_over: bool) -> None:
        message, sequence = order.message, order.sequence
        if isinstance(message, Start | End):
            self._guard.begin_anew(sequence)
        elif self._guard.is_broken(sequence):
            return
        match message:
            case Start():
                self._start(sequence)
            case Align():
                self._token(message, is_over=is_over)
            case Routed():
                inputs = from_blob(order.blobs[0]) if order.blobs else None
                self._routed(message, inputs, is_over=is_over)
            case End():
                self._end(sequence)
            case _:
                assert_never(message)

    def _start(self, sequence: int) -> None:
        self._end(sequence)
        while len(self._spans) >= self._max_sequences:
            self._end(next(iter(self._spans)))
        self._spans[sequence] = None
        self._rival.begin(sequence)

    def _token(self, align: Align, *, is_over: bool) -> None:
        sequence = align.sequence
        if sequence not in self._spans:
            raise ValueError(f"sequence {sequence} is not known")
        if align.cache or not align.tokens:
            raise ValueError(f"sequence {sequence}: needs tokens and no cache")
        span = self._spans[sequence] = Span(sequence, align.position, len(align.tokens))
        self._spans.move_to_end(sequence)
        self._publish(span, self._rival.on_token(sequence), is_over=is_over)
        self.counters.forecast += not is_over
        self.counters.skipped += is_over

    def _routed(self, routed: Routed, x_TH: Tensor | None, *, is_over: bool) -> None:
        """A layer of another step than the one begun comes from before we knew the sequence, or an `Align` was lost."""
        sequence = routed.span.sequence
        if self._spans.get(sequence) != routed.span:
            self.counters.skipped += 1
            return
        forecasts = self._rival.on_routed(sequence, routed.layer, routed.experts, x_TH)
        self._publish(routed.span, forecasts, is_over=is_over)

    def _publish(self, span: Span, forecasts: Forecasts, *, is_over: bool) -> None:
        if is_over:
            return
        for layer, experts in sorted(forecasts.items()):
            self._mailbox.publish(Forecast(span, layer, experts))

    def _end(self, sequence: int) -> None:
        self._spans.pop(sequence, None)
        self._rival.end(sequence)

    def _drop(self, sequence: int) -> None:
        self.counters.failed += 1
        self._end(sequence)

    def _forget_all(self) -> None:
        for sequence in list(self._spans):
            self._end(sequence)
        self._guard.forget_all()
