"""Carries out the server's orders on the shadow, and says what it forecasts. Knows no sockets.

When alignments pile up, each still brings its rows, but only the newest of a sequence is forecast: the full model
has passed the others. Only where the shadow is to go on with its own token is the one before it forecast first. A
forecast under way is given up as soon as an alignment waits that the full model is past it, or that its token is
wrong. A sequence that went wrong is left alone until it starts anew.

With nothing else to do the shadow runs ahead: it goes on with its own next tokens, at most so many beyond the newest
aligned position. Forecasts made that way go out as any other. Where the token was wrong they are void, which every
receiver is told at once, before the position is forecast again.

What the full model's gates saw meanwhile corrects forecasts of the same token's later layers. It is heard between the
layers of a forward, since afterwards it would be too late.

A span at position 0 is a prompt. It is computed for its keys and values: what it routes to is not published, since
nearly every expert is active, and alignments behind it do not make it stale.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import Literal, assert_never

from odmoe_model.tensors import from_blob
from odmoe_predictor.guard import Guard
from odmoe_predictor.lineage import Lineage
from odmoe_predictor.mailbox import Forecast, ForgetAll, Mailbox, Order
from odmoe_predictor.shadow import Shadow
from odmoe_wire.codec import Blob
from odmoe_wire.messages import Align, End, Rollback, Routed, Span, Start


@dataclass
class WorkerCounters:
    """What became of the alignments that asked for a forecast; the times are those of finished forwards. `ahead`:
    positions forecast before they were aligned; `known`: those of them whose token was right when it came;
    `undone`: those whose was not. Of layers forecast, `corrected` were after what the full model's gates saw of the
    token; `uncorrected`: what they saw came too early or too late."""

    forecast: int = 0
    ahead: int = 0
    known: int = 0
    undone: int = 0
    skipped: int = 0
    abandoned: int = 0
    failed: int = 0
    corrected: int = 0
    uncorrected: int = 0
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
        self._lineage = Lineage()
        self._guard = Guard(mailbox, drop=self._drop)

    def work(self) -> bool:
        """Carry out all orders that wait, then forecast what they ask for and run ahead; true if there was
        anything."""
        orders = self._mailbox.take()
        for order in orders:
            if isinstance(order, ForgetAll):
                self._wanted.clear()
                self._limits.clear()
                self._lineage.forget_all()
                self._guard.forget_all()
                self._shadow.forget()
            else:
                self._guard.run(order.sequence, partial(self._obey, order))
        while self._wanted:
            sequence = next(iter(self._wanted))
            span = self._wanted.pop(sequence)
            self._guard.run(sequence, partial(self._forecast, span, is_stale=partial(self._is_stale, span)))
        for sequence in list(self._limits):
            self._guard.run(sequence, partial(self._go_on, sequence))
        return bool(orders)

    def _obey(self, order: Order) -> None:
        message = order.message
        sequence = order.sequence
        if isinstance(message, Start | End):
            self._guard.begin_anew(sequence)
            self._lineage.forget(sequence)
        elif self._guard.is_broken(sequence):
            return
        if order.corrects is not None:
            self._correct(order)
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
            case Routed():
                raise ValueError(f"sequence {sequence}: the shadow did not ask for routings")
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
        wrong = self._lineage.aligned(sequence, position, partial(self._shadow.token_at, sequence))
        if wrong is not None:
            self._mailbox.publish(Rollback(sequence=sequence, position=wrong))
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
            on_routing=partial(self._publish, span),
            is_stale=lambda: is_stale() or self._correct_waiting(),
        )
        if done:
            self.counters.forecast_s += self._clock() - began_s
        else:
            self.counters.abandoned += 1
        return done

    def _correct_waiting(self) -> Literal[False]:
        """Correct forecasts amid a forward, ahead of other orders that wait."""
        for order in self._mailbox.take_corrections():
            self._guard.run(order.sequence, partial(self._correct_early, order))
        return False

    def _correct_early(self, order: Order) -> None:
        """What we remember of a position was computed for the token of its newest alignment. One that waits and names
        another token, or says the sequence is over, makes that worthless; no other order can."""
        waiting = self._mailbox.waiting(order.sequence)
        if all(isinstance(message, Align) and self._agrees(message) for message in waiting):
            self._correct(order)
        else:
            self.counters.uncorrected += 1

    def _correct(self, order: Order) -> None:
        """Forecast a layer anew, now that a gate of the full model has spoken, if that changes the forecast."""
        message, target = order.message, order.corrects
        assert isinstance(message, Routed)
        assert target is not None
        span, correction = message.span, None
        if span.length == 1 and order.blobs:
            x_1H = from_blob(order.blobs[0])
            correction = self._shadow.correct(
                span.sequence, position=span.position, layer=message.layer, x_1H=x_1H, target=target
            )
        if correction is None:
            self.counters.uncorrected += 1
        elif correction.experts != correction.instead:
            self.counters.corrected += 1
            self._publish(span, target, correction.experts, instead=correction.instead)

    def _publish(self, span: Span, layer: int, experts: list[int], *, instead: Sequence[int] = ()) -> None:
        if span.position == 0:
            return
        for position in range(span.position, span.position + span.length):
            token = self._shadow.token_at(span.sequence, position)
            assert token is not None, "what is forecast was fed"
            self._lineage.said(span.sequence, position, token)
        self._mailbox.publish(Forecast(span, layer, experts, instead))

    def _is_over(self, sequence: int) -> bool:
        """Whether something waits that ends the sequence as it is."""
        return self._mailbox.is_forgetting or not all(
            isinstance(message, Align) for message in self._mailbox.waiting(sequence)
        )

    def _is_stale(self, span: Span) -> bool:
        """Whether something waits that makes a forecast worth nothing."""
        if span.position == 0:
            return self._is_over(span.sequence)
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

    def _drop(self, sequence: int) -> None:
        self.counters.failed += 1
        self._wanted.pop(sequence, None)
        self._limits.pop(sequence, None)
        self._lineage.forget(sequence)
        self._shadow.end(sequence)
