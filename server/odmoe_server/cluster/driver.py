"""Drives the cluster's state machine: owns the socket and the clock, carries the tensors. Decides nothing.

`submit`, `post`, `end_sequence` and `drafts` may be called and `snapshot` read from any thread. Everything else is done
by whoever holds the seat: the thread in `run`, or the one that waits for a call, which then need not be woken by the
other (between two layers of a token that costs as much as all there is to do); in single-threaded tests, `pump`.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import assert_never

import torch

from odmoe_model.tensors import from_blob, to_blob
from odmoe_server.cluster.calls import CallError, PendingCall
from odmoe_server.cluster.events import (
    Action,
    CallAbandoned,
    CallFailed,
    CallRequested,
    Event,
    FetchAhead,
    LayerCall,
    Note,
    PartDone,
    PeerMessage,
    PeerUnreachable,
    PromptBegins,
    Send,
    SendCompute,
    SequenceEnded,
    TimePassed,
)
from odmoe_server.cluster.snapshot import snapshot_of
from odmoe_server.cluster.state import ClusterState
from odmoe_server.cluster.timeline import Timeline
from odmoe_wire.codec import Blob, Received
from odmoe_wire.link import Link, PeerGone
from odmoe_wire.messages import AnyMessage, Bye, ComputeFailed, Result, Span
from odmoe_wire.waiting import Wake, wait

log = logging.getLogger(__name__)

# Messages taken from the link before the calls that wait and the time have their turn.
MAX_BURST = 256
# The state machine hears of the time at least this often, so that no deadline is missed by much.
TICK_S = 0.05
# Beyond the call's own deadline: the state machine fails the call, this only guards against a dead driver.
GRACE_S = 5.0
# How soon it is noticed that nobody waits for an answer any more.
LISTENING_S = 0.25
# Whoever waited for a call is expected to wait for the next one within this, and keeps the seat.
RESERVED_S = 0.05


class ClusterDriver:
    """One per server. `timeline` hears of every message; `pump_while_waiting` is for tests in which all roles share
    one thread."""

    def __init__(
        self,
        state: ClusterState,
        *,
        link: Link,
        clock: Callable[[], float] = time.monotonic,
        timeline: Timeline | None = None,
        pump_while_waiting: Callable[[], None] | None = None,
    ) -> None:
        self.state = state
        self.link = link
        self.timeline = timeline
        self.driver_errors_total = 0
        # Asked while a call waits, from the thread that waits: whether all who want its answer have gone.
        self.is_unheard: Callable[[], bool] = lambda: False
        self._clock = clock
        self._take_snapshot(clock())
        self._pump_while_waiting = pump_while_waiting
        self._wake = Wake()
        self._inbox: deque[Callable[[float], None]] = deque()
        self._pending: dict[int, PendingCall] = {}
        self._last_call_id = 0
        self._next_tick_s = clock()
        self._seat = threading.Lock()  # who holds it may use the link and the state
        self._reserved_until_s = 0.0
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    # ------------------------------------------------------------------------------------ from any thread

    def submit(self, call: LayerCall, rows: Mapping[int, torch.Tensor]) -> PendingCall:
        """Ask for a layer's experts; `rows` maps each of them to its x_NH. `await_call` has the answer."""
        pending = PendingCall(call=call, rows=rows)
        self._later(lambda now: self._begin(pending, now))
        return pending

    def await_call(self, pending: PendingCall) -> PendingCall:
        """Wait until all experts' rows are there. Raises CallError when the cluster cannot serve it in time."""
        if (problem := self._wait_for(pending)) is not None:
            self._later(lambda now: self._abandon(pending.call.call_id, now))
            raise CallError(problem)
        if pending.failure is not None:
            raise CallError(pending.failure)
        return pending

    def _wait_for(self, pending: PendingCall) -> str | None:
        """What came between, if anything did."""
        until_s = time.monotonic() + self.state.config.call_timeout_s + GRACE_S
        while not self.await_for(pending, timeout_s=LISTENING_S):
            if self.is_unheard():
                return "nobody waits for the answer any more"
            if self._stopping.is_set():
                return "the server stops"
            if self._pump_while_waiting is None and time.monotonic() > until_s:
                return "the cluster does not answer"
        return None

    def await_for(self, pending: PendingCall, *, timeout_s: float) -> bool:
        """Wait no longer than this; whether the call is over, well or not."""
        end_s = self._clock() + timeout_s
        if self._pump_while_waiting is not None:
            while not pending.done and self._clock() < end_s:
                self._pump_while_waiting()
            return pending.done
        self._reserved_until_s = end_s + RESERVED_S
        if not self._seat.acquire(blocking=False):
            self._wake.set()  # who has it sleeps
            if not self._seat.acquire(timeout=timeout_s):
                return pending.done
        try:
            while not pending.done and (left_s := end_s - self._clock()) > 0 and not self._stopping.is_set():
                self._turn(min(left_s, TICK_S))
        finally:
            self._reserved_until_s = self._clock() + RESERVED_S
            self._seat.release()
        return pending.done

    def give_up(self, pending: PendingCall) -> None:
        """Nobody waits for the call any more: some node is late with it."""
        self._later(lambda now: self._abandon(pending.call.call_id, now, late=True))

    def post(self, message: AnyMessage, *, blobs: Sequence[Blob] = ()) -> None:
        """Send a message to the predictor, if there is one."""
        self._later(lambda _now: self._to_predictor(message, blobs))

    def begin_prompt(self, spans: tuple[Span, ...]) -> None:
        """Prompts, or the first chunks of them, are about to go through the model together."""
        self._later(lambda now: self._do(PromptBegins(spans=spans), now))

    def forecast(self, span: Span, layer: int) -> frozenset[int]:
        """What the predictor said of a span's layer, as far as it is known here; empty when it said nothing. Each
        look-up is one access to a dict, so no lock is needed."""
        return self.state.dispatch.predicted((span,), layer)

    def fetch(self, event: FetchAhead) -> None:
        """Have nodes load experts ahead of their layer's gate."""
        self._later(lambda now: self._do(event, now))

    def end_sequence(self, sequence: int) -> None:
        """Tell everybody that a sequence is over."""
        self._later(lambda now: self._do(SequenceEnded(sequence=sequence), now))

    def drafts(self, sequence: int, position: int, most: int, *, behind: int | None = None) -> tuple[int, ...]:
        """The tokens the predictor's shadow went on with from a position on, as far as they are known here
        (`Drafts.after`). Does not wait; each look-up is one access to a dict, so no lock is needed."""
        return self.state.drafts.after(sequence, position, most, behind=behind)

    def next_call_id(self) -> int:
        """Ids are drawn by the one decode loop, so no lock is needed."""
        self._last_call_id += 1
        return self._last_call_id

    # ---------------------------------------------------------------------------------------- own thread

    def start(self) -> None:
        """Run on a thread of its own."""
        self._thread = threading.Thread(target=self.run, name="cluster", daemon=True)
        self._thread.start()

    def stop(self, *, timeout_s: float = 5.0) -> None:
        """Say goodbye to the peers and end the thread."""
        self._stopping.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout_s)
        self._wake.close()

    def run(self) -> None:
        """Until `stop`."""
        while not self._stopping.is_set():
            reserved_s = self._reserved_until_s - self._clock()
            if reserved_s > 0:
                self._stopping.wait(min(reserved_s, TICK_S))
                continue
            with self._seat:
                self._turn(TICK_S)
        with self._seat:
            for peer_id in list(self.state.peers.admitted):
                self._send(peer_id, Bye(reason="the server stops"), epoch=self.state.peers.epoch)
            self.link.close()

    def _turn(self, timeout_s: float) -> None:
        """Sleep until there is something to do, and do it."""
        with self._surviving():
            wait([self.link], self._wake, timeout_s=timeout_s)
            self.pump(self._clock())

    @contextmanager
    def _surviving(self) -> Iterator[None]:
        try:
            yield
        except Exception:  # outermost loop: one bad event must not end all requests
            self.driver_errors_total += 1
            log.exception("the cluster's driver failed on an event")

    def pump(self, now: float) -> bool:
        """Handle all that waits; True if anything did."""
        self._wake.clear()
        busy = self._take_inbox(now)
        for _ in range(MAX_BURST):
            if (item := self.link.receive()) is None:
                break
            busy = True
            self._received(*item, now)
        else:
            self._wake.set()  # there may be more
        if now >= self._next_tick_s:
            late_s, self._next_tick_s = now - self._next_tick_s, now + TICK_S
            self._do(TimePassed(late_s=late_s), now)
            self._take_snapshot(now)
        elif self.snapshot.epoch != self.state.peers.epoch:
            self._take_snapshot(now)
        return busy

    # -------------------------------------------------------------------------------------------- insides

    def _take_inbox(self, now: float) -> bool:
        busy = bool(self._inbox)
        while self._inbox:
            self._inbox.popleft()(now)
        return busy

    def _take_snapshot(self, now: float) -> None:
        self.snapshot = snapshot_of(
            self.state,
            protocol_errors=self.link.protocol_errors,
            bad_messages=self.link.bad_messages,
            loop_errors=self.driver_errors_total,
            now=now,
        )

    def _later(self, job: Callable[[float], None]) -> None:
        """Have a job done by whoever holds the seat; here and now if nobody does."""
        self._inbox.append(job)
        if self._pump_while_waiting is not None or not self._seat.acquire(blocking=False):
            self._wake.set()
            return
        try:
            with self._surviving():
                self._take_inbox(self._clock())
        finally:
            self._seat.release()

    def _begin(self, pending: PendingCall, now: float) -> None:
        call_id = pending.call.call_id
        self._pending[call_id] = pending
        self._do(CallRequested(call=pending.call), now)
        pending.predicted = self.state.dispatch.calls[call_id].predicted

    def _abandon(self, call_id: int, now: float, *, late: bool = False) -> None:
        self._pending.pop(call_id, None)
        self._do(CallAbandoned(call_id=call_id, late=late), now)

    def _received(self, peer_id: str, received: Received, now: float) -> None:
        message = received.message
        if self.timeline is not None and peer_id in self.state.peers.admitted:
            self.timeline.heard(peer_id, message)
        rows_NH: torch.Tensor | None = None
        if isinstance(message, Result):
            rows_NH = from_blob(received.blobs[0])
            if not self._fits(message, rows_NH):
                message = ComputeFailed(
                    request_id=message.request_id,
                    code="bad_request",
                    reason="its result has another shape or dtype",
                )
        self._do(PeerMessage(peer_id=peer_id, epoch=received.epoch, message=message), now, rows_NH=rows_NH)

    def _fits(self, result: Result, rows_NH: torch.Tensor) -> bool:
        """Whether a result is shaped as its request asks; one that nobody waits for fits anything."""
        request = self.state.dispatch.requests.get(result.request_id)
        if request is None:
            return True
        pending = self._pending[request.call_id]
        sample_NH = pending.rows[request.experts[0]]
        num_rows = sum(pending.call.counts[expert] for expert in request.experts)
        return rows_NH.shape == (num_rows, sample_NH.shape[-1]) and rows_NH.dtype == sample_NH.dtype

    def _do(self, event: Event, now: float, *, rows_NH: torch.Tensor | None = None) -> None:
        for action in self.state.handle(event, now):
            self._act(action, rows_NH)

    def _act(self, action: Action, rows_NH: torch.Tensor | None) -> None:
        match action:
            case Send():
                self._send(action.peer_id, action.message, epoch=action.epoch)
            case SendCompute():
                rows = self._pending[action.call_id].blob_rows(action.message.experts)
                self._send(action.peer_id, action.message, epoch=action.epoch, blobs=[to_blob(rows)])
            case PartDone():
                assert rows_NH is not None
                pending = self._pending[action.call_id]
                pending.accept(action, rows_NH)
                if action.last:
                    del self._pending[action.call_id]
                    if not pending.call.is_prompt:
                        self.state.ledger.served(pending.call.layer, pending.timings)
            case CallFailed():
                self._pending.pop(action.call_id).fail(action.reason)
            case Note():
                log.log(logging.INFO if action.level == "info" else logging.WARNING, "%s", action.text)
            case _:
                assert_never(action)

    def _send(self, peer_id: str, message: AnyMessage, *, epoch: int, blobs: Sequence[Blob] = ()) -> None:
        """A peer that cannot be reached is an event of its own, handled before anything else is."""
        if self.timeline is not None:
            self.timeline.told(peer_id, message)
        try:
            self.link.send(peer_id, message, epoch=epoch, blobs=blobs)
        except PeerGone:
            if peer_id in self.state.peers.admitted and not isinstance(message, Bye):
                self._later(lambda now: self._do(PeerUnreachable(peer_id=peer_id), now))

    def _to_predictor(self, message: AnyMessage, blobs: Sequence[Blob]) -> None:
        predictor = self.state.peers.predictor()
        if predictor is not None:
            self._send(predictor.hello.peer_id, message, epoch=self.state.peers.epoch, blobs=blobs)
