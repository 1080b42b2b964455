"""A node agent's links, clock and lanes: takes events to the core and does what it says. Decides nothing
itself.

`run` is the loop of a thread or process; `pump` does all that waits once, for tests without threads. An agent
keeps to itself: several can live in one process, and signals are its caller's business.
"""

import logging
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from time import monotonic
from typing import assert_never

import msgspec
import torch
from torch import Tensor

from odmoe_model.tensors import from_blob, to_blob
from odmoe_node.arrival import ArrivingSlots
from odmoe_node.bank import SlotBank
from odmoe_node.events import (
    Action,
    Answer,
    BreakOff,
    ComputeBroke,
    ComputeDone,
    Event,
    Forget,
    LoadBroke,
    LoadDone,
    LoadStopped,
    Mention,
    ServerLost,
    StartCompute,
    StartLoad,
    Tell,
    Tick,
    Told,
)
from odmoe_node.lanes import Inbox, InlineLane, Job, Lane, ThreadLane
from odmoe_node.memory import resident_bytes
from odmoe_node.requests import runs_of
from odmoe_node.state import NodeState
from odmoe_node.stopping import BrokenOffError
from odmoe_node.timed import TimedLoads, TimedSlots
from odmoe_wire.codec import Blob, Received
from odmoe_wire.link import Link, PeerGone
from odmoe_wire.messages import (
    MAX_LOADED_TOLD,
    AnyMessage,
    Bye,
    Cancel,
    Compute,
    ComputeFailed,
    Heartbeat,
    Hello,
    Load,
    Loaded,
    ProtocolErrorNotice,
    Refused,
    Release,
    Result,
    Rollback,
    Schedule,
    SlotReport,
    View,
    Welcome,
    Withdraw,
)
from odmoe_wire.session import Session
from odmoe_wire.waiting import Wake, wait

log = logging.getLogger(__name__)

SERVER = "server"
PREDICTOR = "predictor"
MAX_BURST = 64  # messages taken from one link before the others and the heartbeats have their turn
DRAIN_S = 5.0  # for computes in hand when the node is told to leave
FAREWELL_S = 0.1  # for the last messages to get out of the process


class RefusedError(Exception):
    """The server does not take this node in; the text is the server's reason."""


@dataclass(slots=True, eq=False)
class InHand:
    """Rows of a request: per expert those to compute, how they are cut into runs, and those computed."""

    rows: dict[int, Tensor]  # expert -> x_NH
    runs: dict[int, tuple[int, ...]]
    outputs: dict[int, Tensor] = field(default_factory=dict)  # expert -> y_NH


@dataclass(slots=True)
class Peer:
    """The server or the predictor: its link and where we stand with it."""

    name: str
    link: Link
    session: Session
    heartbeats: int = 0


class NodeAgent:
    """`hello` tells who we are. With `threads`, loads and computes are done on threads of their own, each of which
    lets torch use `torch_threads`; without, where `pump` is called."""

    def __init__(
        self,
        hello: Hello,
        *,
        bank: SlotBank,
        server: Link,
        predictor: Link | None = None,
        clock: Callable[[], float] = monotonic,
        hello_every_s: float = 0.25,
        torch_threads: int = 1,
        threads: bool = True,
    ) -> None:
        self._arriving = bank if isinstance(bank, ArrivingSlots) else None
        on_arrival = self._arriving is not None
        self.state = NodeState(num_slots=hello.slots, slot_bytes=bank.slot_bytes, on_arrival=on_arrival)
        self.loop_errors = 0
        self.undelivered = 0
        self._hello = hello
        self._bank = bank
        self._clock = clock
        self._torch_threads = torch_threads
        self._wake = Wake()
        self._inbox = Inbox(self._wake)
        links = {SERVER: server} if predictor is None else {SERVER: server, PREDICTOR: predictor}
        self._peers = {
            name: Peer(name, link, Session(hello_every_s=hello_every_s, now=clock())) for name, link in links.items()
        }
        self._server = self._peers[SERVER]
        self._links = list(links.values())
        # In virtual time nothing sleeps: a load is over when it was asked for.
        has_times = threads and isinstance(bank, TimedSlots)
        self._timed = TimedLoads(bank, clock=clock) if has_times and isinstance(bank, TimedSlots) else None
        self._loads = self._lane("load", threads=threads, torch_threads=torch_threads)
        self._computes = self._lane("compute", threads=threads, torch_threads=torch_threads)
        self._brief: Job | None = None  # a compute to be done on this thread
        self._mentions: list[Mention] = []
        self._in_hand: dict[int, InHand] = {}
        self._stops = [threading.Event() for _ in range(hello.slots)]  # of each slot's load
        self._stopping = False

    # ------------------------------------------------------------------------------- the loop

    def run(self) -> None:
        """Until `stop`, then finish the computes in hand (at most `DRAIN_S`), say goodbye and close the
        links. Raises RefusedError when the server does not want us."""
        torch.set_num_threads(self._torch_threads)  # of this thread, which computes too
        try:
            while not self._stopping:
                self._turn()
            self._drain()
        finally:
            self._leave()

    def stop(self) -> None:
        """Make `run` end now; from any thread."""
        self._stopping = True
        self._wake.set()

    def stop_soon(self) -> None:
        """Make `run` end within a heartbeat; takes no lock, so that a signal handler may call it."""
        self._stopping = True

    def pump(self, now: float, *, ready: Collection[Link] | None = None) -> bool:
        """Do all that waits; true if there was anything. `ready`: the links that have something, if that is known."""
        self._wake.clear()
        busy = self._take_ended(now)
        for peer in self._peers.values():
            if ready is None or peer.link in ready:
                busy = self._take_messages(peer, now) or busy
        busy = self._take_ended(now) or busy
        busy = self._compute_briefly() or busy
        deadline_s = self.state.next_deadline_s()
        if deadline_s is not None and deadline_s <= now:
            self._do(Tick(), now)
        for peer in self._peers.values():
            self._keep_up(peer, now)
        self._inbox.let_loads_wait(not self.state.awaits_load)
        if self._brief is not None:
            self._wake.set()
        return busy

    def report(self) -> SlotReport:
        """What the node's memory and work look like now."""
        counters, state = self.state.counters, self.state
        return SlotReport(
            used_slots=state.used_slots,
            accounted_bytes=state.accounted_bytes,
            arena_bytes=self._bank.arena_bytes,
            budget_bytes=self._hello.budget_bytes,
            rss_bytes=resident_bytes(),
            loads_total=counters.loads,
            loads_failed_total=counters.loads_failed,
            loads_cancelled_total=counters.loads_cancelled,
            loads_unused_total=counters.loads_unused,
            load_bytes_total=counters.loads * self._bank.slot_bytes,
            load_s_total=counters.load_s,
            compute_s_total=counters.compute_s,
            protocol_errors_total=sum(peer.link.protocol_errors for peer in self._peers.values()),
            loads_broken_off_total=counters.loads_broken_off,
            broken_off_s_total=counters.broken_off_s,
            evictions_total=counters.evictions,
            late_forecasts_total=counters.late_forecasts,
            overflowed_total=counters.overflowed,
            stale_total=counters.stale,
            duplicates_total=counters.duplicates,
            expired_total=counters.expired,
            undelivered_total=self.undelivered,
            loop_errors_total=self.loop_errors,
            load_counts=list(counters.load_counts),
        )

    def _turn(self) -> None:
        try:
            ready = wait(self._links, self._wake, timeout_s=self._wait_s(self._clock()))
            self.pump(self._clock(), ready=ready or ())
        except RefusedError:
            raise
        except Exception:  # outermost loop: one bad event must not end the node
            self.loop_errors += 1
            log.exception("the node failed on an event; the story so far: %s", list(self.state.story)[-20:])

    def _wait_s(self, now: float) -> float:
        waits_s = [peer.session.wait_s(now) for peer in self._peers.values()]
        deadline_s = self.state.next_deadline_s()
        if deadline_s is not None:
            waits_s.append(max(0.0, deadline_s - now))
        if self._timed is not None and not self._inbox.loads_can_wait:
            waits_s += [left_s for left_s in [self._timed.left_s()] if left_s is not None]
        return max(0.0, min(waits_s))

    def _drain(self) -> None:
        until_s = self._clock() + DRAIN_S
        while self.state.num_requests and self._clock() < until_s:
            self._turn()

    def _leave(self) -> None:
        log.info("%s leaves: %s", self._hello.peer_id, self.state.counters)
        for peer in self._peers.values():
            self._send(peer, Bye(reason="the node was told to stop"))
        self._wake.clear()
        wait([], self._wake, timeout_s=FAREWELL_S)
        for lane in (self._loads, self._computes):
            lane.stop(timeout_s=DRAIN_S)
        for peer in self._peers.values():
            peer.link.close()
        self._wake.close()

    def _lane(self, work: str, *, threads: bool, torch_threads: int) -> Lane:
        if not threads:
            return InlineLane(self._inbox)
        # Said in each thread: OpenMP and MKL keep it per thread, and a new one would take all cores. Measured on two
        # busy cores: a computation of 0.1 ms then takes up to 24 ms, waiting for its helpers.
        name = f"{self._hello.peer_id}-{work}"
        return ThreadLane(self._inbox, name=name, prepare=lambda: torch.set_num_threads(torch_threads))

    # ------------------------------------------------------------------------- what comes in

    def _take_ended(self, now: float) -> bool:
        busy = False
        while (event := self._inbox.take()) is not None:
            busy = True
            self._do(event, now)
        while self._timed is not None and (event := self._timed.take()) is not None:
            busy = True
            self._do(event, now)
        return busy

    def _compute_briefly(self) -> bool:
        """Do one compute that is better done here than sent to another thread and back."""
        if self._brief is None:
            return False
        job, self._brief = self._brief, None
        ended = job.event()
        self._do(ended, self._clock())
        return True

    def _take_messages(self, peer: Peer, now: float) -> bool:
        for taken in range(MAX_BURST):
            item = peer.link.receive()
            if item is None:
                return taken > 0
            received = item[1]
            was_joined = peer.session.is_joined
            peer.session.heard(received.message, now)
            if peer.session.is_joined and not was_joined:
                log.info("%s is connected to the %s", self._hello.peer_id, peer.name)
            if peer is self._server:
                self._from_server(received, now, was_joined=was_joined)
            else:
                self._from_predictor(received, now)
        self._wake.set()  # there may be more
        return True

    def _from_server(self, received: Received, now: float, *, was_joined: bool) -> None:
        message = received.message
        match message:
            case Compute():
                self._on_compute(message, received, now)
            case Welcome() | View() | Load() | Release() | Cancel() | Withdraw():
                self._do(Told(message, received.epoch), now)
            case Bye(reason=reason):
                # To whom it does not know it says so at every message.
                log.log(logging.WARNING if was_joined else logging.DEBUG, "the server says bye: %s", reason)
                self._do(ServerLost(), now)
            case Refused(reason=reason):
                raise RefusedError(reason)
            case ProtocolErrorNotice(reason=reason):
                log.warning("the server did not accept a message: %s", reason)
            case _:  # heartbeats have served as life signs; forecasts come from the predictor alone
                pass

    def _from_predictor(self, received: Received, now: float) -> None:
        match received.message:
            case Schedule() | Rollback() as message:
                if not self._stopping:
                    self._do(Told(message, received.epoch), now)
            case ProtocolErrorNotice(reason=reason):
                log.warning("the predictor did not accept a message: %s", reason)
            case _:  # its welcome, heartbeats and bye are the session's business
                pass

    def _on_compute(self, message: Compute, received: Received, now: float) -> None:
        if self._stopping:
            reason = "the node is about to leave"
            self._send(self._server, ComputeFailed(request_id=message.request_id, code="cancelled", reason=reason))
            return
        if not self.state.in_hand(message.request_id):
            rows_TH = from_blob(received.blobs[0])
            rows = dict(zip(message.experts, torch.split(rows_TH, message.counts), strict=True))
            self._in_hand[message.request_id] = InHand(rows, runs_of(message))
        self._do(Told(message, received.epoch), now)
        if not self.state.in_hand(message.request_id):  # stale, or repeated after its end
            self._in_hand.pop(message.request_id, None)

    # ------------------------------------------------------------------------- what goes out

    def _do(self, event: Event, now: float) -> None:
        if isinstance(event, ServerLost):
            self._mentions.clear()
        actions = self.state.handle(event, now)
        for action in actions:
            self._act(action, now)
        # Who decides by what is in the slots must not wait for it.
        is_urgent = bool(self._mentions) and self.state.tells_held
        if is_urgent or len(self._mentions) >= MAX_LOADED_TOLD:
            for loaded in self._news(now):
                self._send(self._server, loaded)

    def _act(self, action: Action, now: float) -> None:
        match action:
            case StartLoad():
                self._start_load(action)
            case BreakOff(slot=slot):
                self._break_off(slot)
            case StartCompute():
                if self._is_brief(action):
                    assert self._brief is None, "there is one slot"
                    self._brief = self._compute_job(action)
                else:
                    self._computes.submit(self._compute_job(action))
            case Answer(message=message):
                in_hand = self._in_hand.pop(message.request_id)
                if isinstance(message, Result):
                    message = msgspec.structs.replace(message, held=self.state.held(), loaded=self._news(now))
                self._send(self._server, message, blobs=_result_blobs(message, in_hand))
            case Forget(request_id=request_id):
                del self._in_hand[request_id]
            case Tell(message=message):
                self._send(self._server, message)
            case Mention():
                self._mentions.append(action)
            case _:
                assert_never(action)

    def _news(self, now: float) -> list[Loaded]:
        """What the server has not heard of the loads that ended lately."""
        mentions, self._mentions = self._mentions, []
        held = self.state.held()
        return [
            msgspec.structs.replace(mention.message, ago_s=max(0.0, now - mention.ended_s), held=held)
            for mention in mentions
        ]

    def _start_load(self, order: StartLoad) -> None:
        if self._arriving is not None:
            self._arriving.expect(order.slot)
        if self._timed is None:
            self._loads.submit(self._load_job(order))
        elif (event := self._timed.begin(order)) is not None:
            self._inbox.put(event)

    def _break_off(self, slot: int) -> None:
        if self._timed is None:
            self._stops[slot].set()
        elif (event := self._timed.break_off(slot)) is not None:
            self._inbox.put(event)

    def _is_brief(self, order: StartCompute) -> bool:
        """Only `TimedSlots` tell how long a compute on arrival will wait."""
        wait_s = self._timed.left_s(order.slot) if order.on_arrival and self._timed is not None else None
        return self.state.is_brief(order, wait_s=wait_s)

    def _load_job(self, order: StartLoad) -> Job:
        stop, (layer, expert) = self._stops[order.slot], order.key
        stop.clear()  # the slot's former load has ended

        def run() -> Event:
            began_s = monotonic()
            try:
                load_s = self._bank.load(order.slot, layer, expert, stop=stop)
                return LoadDone(order.slot, load_s, self._clock())
            except BrokenOffError:
                return LoadStopped(order.slot, monotonic() - began_s)

        return Job(run, lambda reason: LoadBroke(order.slot, reason))

    def _compute_job(self, order: StartCompute) -> Job:
        in_hand, expert = self._in_hand[order.request_id], order.key.expert

        def run() -> Event:
            began_s, waited_s = monotonic(), 0.0
            x_NH, runs = in_hand.rows[expert], in_hand.runs[expert]
            if order.on_arrival:
                assert self._arriving is not None, "the state was told so"
                in_hand.outputs[expert], waited_s = self._arriving.rows_on_arrival(order.slot, x_NH, runs)
            else:
                in_hand.outputs[expert] = self._bank.rows(order.slot, x_NH, runs)
            return ComputeDone(order.slot, monotonic() - began_s - waited_s, waited_s)

        return Job(run, lambda reason: ComputeBroke(order.slot, reason))

    def _keep_up(self, peer: Peer, now: float) -> None:
        """Say hello or a life sign if it is due; notice that the other side is gone."""
        if peer.session.check_lost(now):
            log.warning("the %s is silent; saying hello until it returns", peer.name)
            if peer is self._server:
                self._do(ServerLost(), now)
        due = peer.session.due(now)
        if due == "hello":
            self._send(peer, self._hello)
        elif due == "heartbeat":
            self._send(peer, Heartbeat(count=peer.heartbeats))
            peer.heartbeats += 1
            if peer is self._server:
                self._send(peer, self.report())
                for loaded in self._news(now):
                    self._send(peer, loaded)
        if due is not None:
            peer.session.said(now)

    def _send(self, peer: Peer, message: AnyMessage, *, blobs: tuple[Blob, ...] = ()) -> None:
        try:
            peer.link.send(peer.name, message, epoch=self.state.epoch, blobs=blobs)
        except PeerGone as error:
            # Its silence will be noticed; an answer that is lost meanwhile the server asks of another node.
            self.undelivered += not isinstance(message, Hello)
            log.debug("not sent: %s to %s", type(message).__name__, error)


def _result_blobs(message: Result | ComputeFailed, in_hand: InHand) -> tuple[Blob, ...]:
    """The outputs in the order of the request's experts, as one blob [T, H]; none with a failure."""
    if isinstance(message, ComputeFailed):
        return ()
    outputs = [in_hand.outputs[timing.expert] for timing in message.timings]
    return (to_blob(outputs[0] if len(outputs) == 1 else torch.cat(outputs)),)
