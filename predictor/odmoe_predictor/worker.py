"""Carries out the server's orders on the shadow, and says what it forecasts. Knows no sockets.

When alignments pile up, each still brings its rows, but only the newest of a sequence is forecast: the full model
has passed the others. Only where the shadow is to go on with its own token is the one before it forecast first. A
forecast under way is given up as soon as an alignment waits that the full model is past it, or that its token is
wrong. A sequence that went wrong is left alone until it starts anew.

Sequences take turns (`turns`), and those whose caches allow it share a forward. With nothing else to do the shadow
runs ahead: it goes on with its own next tokens, at most so many beyond the newest aligned position. Forecasts made that
way go out as any other, and the server hears the tokens they were made for, as drafts. Where the token was wrong they
are void, which every receiver is told at once, before the position is forecast again.

What the full model's gates saw meanwhile corrects forecasts of the same token's later layers. It is heard between the
layers of a forward, since afterwards it would be too late.

A span at position 0 is a prompt. It is computed for its keys and values, a long one in several turns: what it routes to
is not published, since nearly every expert is active, and alignments behind it do not make it stale.
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
from odmoe_predictor.ragged import MOST_TOGETHER
from odmoe_predictor.shadow import Aligned, Shadow
from odmoe_predictor.turns import Turns
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
        self._turns = Turns(run_ahead=run_ahead)
        self._goes_ahead = run_ahead > 0
        self._lineage = Lineage()
        self._guard = Guard(mailbox, drop=self._drop)

    def work(self) -> bool:
        """Carry out all orders that wait, then forecast what they ask for and run ahead until there are new ones; true
        if there was anything."""
        orders = self._mailbox.take()
        for order in orders:
            if isinstance(order, ForgetAll):
                self._turns.stop_all()
                self._lineage.forget_all()
                self._guard.forget_all()
                self._shadow.forget()
            else:
                self._guard.run(order.sequence, partial(self._obey, order))
        while self._turn() and not self._mailbox.has_orders:
            pass
        return bool(orders)

    def _turn(self) -> bool:
        """One forward for whoever is due; false when nobody is."""
        wanted = [span.sequence for span in self._turns.wanted()]
        if wanted and self._shadow.has_long(wanted[0]):
            self._guard.run(wanted[0], partial(self._feed_some, self._turns.take(wanted[0])))
            return True
        if wanted:
            spans = [self._turns.take(sequence) for sequence in self._shadow.together(wanted)]
            for span in self._serve(spans):
                self.counters.forecast += 1
                self._turns.allow_ahead(span)
            return True
        if self._mailbox.has_orders:
            return False
        lengths = self._shadow.lengths()
        ahead = self._turns.ahead(lengths)
        if not ahead:
            return False
        going = [sequence for sequence in self._abreast(ahead) if self._goes_on(sequence)]
        spans = [Span(sequence, lengths[sequence], 1) for sequence in self._shadow.together(going)]
        self.counters.ahead += len(self._serve(spans))
        return True

    def _abreast(self, ahead: list[int]) -> list[int]:
        """Those of which some may share the first one's forward."""
        return ahead[:MOST_TOGETHER] if self._shadow.shares(ahead[0]) else ahead[:1]

    def _goes_on(self, sequence: int) -> bool:
        """Whether the shadow has a next token of its own; without one the sequence gets no more turns."""
        going: list[Aligned] = []
        self._guard.run(sequence, lambda: going.append(self._shadow.go_on(sequence)))
        if going != ["forecast"]:
            self._turns.stop(sequence)
        return going == ["forecast"]

    def _serve(self, spans: list[Span]) -> list[Span]:
        """Forecast for a sequence, or for several in one forward; those that were finished."""
        done: list[Span] = []
        if len(spans) > 1 and self._guard.attempt(lambda: done.extend(self._run_together(spans))):
            return done
        for span in spans:
            self._guard.run(
                span.sequence, partial(self._forecast, span, is_stale=partial(self._is_stale, span), done=done)
            )
        return done

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
        span = self._turns.stop(sequence)
        if span is not None and isinstance(message, Align) and not message.tokens:
            done: list[Span] = []
            self._forecast(span, is_stale=partial(self._is_over, sequence), done=done)
            self.counters.forecast += len(done)
        elif span is not None:
            self.counters.skipped += 1
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
            self._turns.want(span)
        elif asked == "known":
            self._turns.allow_ahead(span)

    def _feed_some(self, span: Span) -> None:
        """A part of something long; for the rest of it the sequence gets in line again. It is needed whatever token
        the full model is at."""
        is_over = partial(self._is_over, span.sequence)
        if self._shadow.feed_some(span.sequence, is_stale=lambda: is_over() or self._correct_waiting()):
            self._turns.want(span)
        else:
            self.counters.abandoned += 1

    def _forecast(self, span: Span, *, is_stale: Callable[[], bool], done: list[Span]) -> None:
        """Feed the shadow what it remembers, whose newest tokens are the span's, which is then `done`."""
        if is_stale():
            self.counters.skipped += 1
            return
        began_s = self._clock()
        finished = self._shadow.forecast(
            span.sequence,
            on_routing=partial(self._publish, span),
            is_stale=lambda: is_stale() or self._correct_waiting(),
        )
        self._finished([span] if finished else [], out_of=1, began_s=began_s)
        done += [span] if finished else []

    def _run_together(self, spans: list[Span]) -> list[Span]:
        """The same for several sequences, a token of each."""
        due = {span.sequence: span for span in spans if not self._is_stale(span)}
        self.counters.skipped += len(spans) - len(due)
        if not due:
            return []
        began_s = self._clock()
        finished = self._shadow.forecast_together(
            list(due),
            on_routing=lambda sequence, layer, experts: self._publish(due[sequence], layer, experts),
            is_stale=lambda sequence: self._is_stale(due[sequence]) or self._correct_waiting(),
            go_on=self._goes_ahead,
        )
        done = [due[sequence] for sequence in finished]
        self._finished(done, out_of=len(due), began_s=began_s)
        return done

    def _finished(self, done: list[Span], *, out_of: int, began_s: float) -> None:
        if done:
            self.counters.forecast_s += self._clock() - began_s
        self.counters.abandoned += out_of - len(done)

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
        tokens = []
        for position in range(span.position, span.position + span.length):
            token = self._shadow.token_at(span.sequence, position)
            assert token is not None, "what is forecast was fed"
            self._lineage.said(span.sequence, position, token)
            tokens.append(token)
        # With the first layer: the earlier the server has a draft, the more it is worth.
        self._mailbox.publish(Forecast(span, layer, experts, instead, tokens if layer == 0 else ()))

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
        self._turns.stop(sequence)
        self._lineage.forget(sequence)
        self._shadow.end(sequence)
