"""The cluster's state machine: events in, actions out. Pure: no socket, no clock, no thread, no tensor.

Puts together who takes part (`peers`) and who computes what (`dispatch`), and keeps a short story of what happened.
"""

from collections import Counter, deque
from dataclasses import dataclass, field
from math import inf
from typing import assert_never

from odmoe_server.cluster.dispatch import Dispatch
from odmoe_server.cluster.drafts import Drafts
from odmoe_server.cluster.events import (
    Action,
    CallAbandoned,
    CallRequested,
    Event,
    FetchAhead,
    Note,
    PeerMessage,
    PeerUnreachable,
    PromptBegins,
    Send,
    SequenceEnded,
    TimePassed,
)
from odmoe_server.cluster.ledger import Ledger
from odmoe_server.cluster.peers import ClusterConfig, Peer, Peers
from odmoe_server.importance.residency import Residency
from odmoe_wire.messages import (
    AnyMessage,
    Bye,
    Cancel,
    ComputeFailed,
    End,
    Heartbeat,
    Hello,
    Loaded,
    LoadFailed,
    ProtocolErrorNotice,
    Result,
    Rollback,
    Schedule,
    ShadowReport,
    SlotReport,
)

STORY_LENGTH = 200
# A tick that comes so much later than it was to come says that we stood still: the process, its machine, or its thread.
STOOD_STILL_S = 0.1


@dataclass(kw_only=True)
class ClusterState:
    """Mutated by `handle` alone, from one thread."""

    config: ClusterConfig
    peers: Peers = field(init=False)
    dispatch: Dispatch = field(init=False)
    drafts: Drafts = field(default_factory=Drafts)
    ledger: Ledger = field(init=False)
    residency: Residency = field(default_factory=Residency)
    stale_total: int = 0
    story: deque[tuple[float, str]] = field(default_factory=lambda: deque(maxlen=STORY_LENGTH))
    # Since when one node alone takes part; infinite when that was said.
    _alone_since_s: float | None = None

    def __post_init__(self) -> None:
        self.peers = Peers(config=self.config)
        self.ledger = Ledger(num_layers=self.config.num_layers)
        self.dispatch = Dispatch(config=self.config, ledger=self.ledger)

    def handle(self, event: Event, now: float) -> list[Action]:
        """What is to be done about an event, in order."""
        actions = self._handle(event, now)
        if isinstance(event, TimePassed | CallAbandoned) or self.peers.epoch != self.residency.epoch:
            members = self.peers.members()
            suspects = self.dispatch.suspects.among(members, now)
            self.residency.take_part(members, suspects=suspects, epoch=self.peers.epoch)
        self.story.extend((now, action.text) for action in actions if isinstance(action, Note))
        return actions

    def _handle(self, event: Event, now: float) -> list[Action]:
        match event:
            case CallRequested():
                return self.dispatch.begin(event.call, self.peers.members(), epoch=self.peers.epoch, now=now)
            case PromptBegins():
                return self.dispatch.begin_prompt(event.spans, self.peers.members(), epoch=self.peers.epoch)
            case FetchAhead():
                return self._fetch(event)
            case CallAbandoned():
                if event.late:
                    self.dispatch.suspect(event.call_id, now=now)
                self.dispatch.abandon(event.call_id)
                return []
            case SequenceEnded():
                return self._sequence_ended(event.sequence)
            case PeerMessage():
                return self._message(event, now)
            case PeerUnreachable():
                return self._lost(event.peer_id, now, reason="it cannot be reached")
            case TimePassed():
                return self._tick(event, now)
            case _:
                assert_never(event)

    def _fetch(self, event: FetchAhead) -> list[Action]:
        for node_id, num_loads in Counter(event.where.values()).items():
            self.residency.make_room(node_id, num_loads=num_loads, leaving=event.leaving.get(node_id, ()))
        return self.dispatch.fetch(event, self.peers.members(), epoch=self.peers.epoch)

    def _message(self, event: PeerMessage, now: float) -> list[Action]:
        peer_id, message = event.peer_id, event.message
        if isinstance(message, Hello):
            return self._hello(peer_id, message, now)
        peer = self.peers.admitted.get(peer_id)
        if peer is None:  # it took us for alive over our restart, or we took it for dead over its pause
            bye = Bye(reason="not admitted: say hello")
            return [Send(peer_id=peer_id, message=bye, epoch=self.peers.epoch)]
        self.peers.heard(peer_id, now)
        if isinstance(message, Heartbeat):
            return self.peers.missed_view(peer_id, event.epoch)
        return self._from_admitted(peer, event.epoch, message, now)

    def _from_admitted(self, peer: Peer, epoch: int, message: AnyMessage, now: float) -> list[Action]:
        peer_id = peer.hello.peer_id
        match message:
            case Result():
                self._holds(peer_id, message)
                for loaded in message.loaded:
                    self.residency.costs.loaded(loaded.load_s)
                return self.dispatch.result(peer_id, message, epoch=self.peers.epoch, now=now)
            case Loaded():
                self.residency.costs.loaded(message.load_s)
                self._holds(peer_id, message)
                return []
            case Schedule() | Rollback():
                self._forecast(peer, epoch, message)
                return []
            case SlotReport() | ShadowReport():
                peer.reported(message)
                return []
            case ComputeFailed():
                text = f"node {peer_id} could not compute: {message.code}: {message.reason}"
                retry = self.dispatch.refused(message.request_id, self.peers.members(), epoch=self.peers.epoch, now=now)
                return [Note(level="warning", text=text), *retry]
            case LoadFailed():
                where = f"layer {message.layer} expert {message.expert}"
                return [Note(level="warning", text=f"node {peer_id} could not load {where}: {message.reason}")]
            case Bye():
                return self._lost(peer_id, now, reason=message.reason)
            case ProtocolErrorNotice():
                return [Note(level="warning", text=f"{peer_id} did not accept a message: {message.reason}")]
            case _:
                return []

    def _holds(self, peer_id: str, message: Result | Loaded) -> None:
        if self.config.mode == "importance":
            self.residency.reported(peer_id, message.held)

    def _forecast(self, peer: Peer, epoch: int, message: Schedule | Rollback) -> None:
        """Nodes drop forecasts placed by an older view, so they must not count here either. A draft has no place."""
        if peer.hello.role != "predictor":
            self.stale_total += 1
            return
        is_stale = epoch != self.peers.epoch
        self.stale_total += is_stale
        if isinstance(message, Schedule):
            self.drafts.said(message)
            if not is_stale:
                self.dispatch.forecast(message, self.peers.members())
        else:
            self.ledger.realigns_total += 1
            self.drafts.rollback(message)
            if not is_stale:
                self.dispatch.rollback(message)

    def _hello(self, peer_id: str, hello: Hello, now: float) -> list[Action]:
        known = self.peers.admitted.get(peer_id)
        before: list[Action] = []
        if known is not None and known.hello.incarnation != hello.incarnation:
            before = self._lost(peer_id, now, reason="it was restarted")
        epoch_before = self.peers.epoch
        admitted = self.peers.admit(peer_id, hello, now)
        if self.peers.epoch != epoch_before:
            self.dispatch.forget_forecasts()  # they were placed by a view that is over
        return before + admitted

    def _lost(self, peer_id: str, now: float, *, reason: str) -> list[Action]:
        if peer_id not in self.peers.admitted:
            return []
        if self.peers.admitted[peer_id].hello.role == "predictor":
            self.drafts.clear()
        actions = self.peers.remove(peer_id, reason=reason)
        self.dispatch.forget_forecasts()  # they were placed by a view that is over
        return actions + self.dispatch.node_lost(peer_id, self.peers.members(), epoch=self.peers.epoch, now=now)

    def _sequence_ended(self, sequence: int) -> list[Action]:
        self.dispatch.forget(sequence)
        self.drafts.forget(sequence)
        cancel, end = Cancel(sequence=sequence), End(sequence=sequence)
        return [
            Send(peer_id=peer_id, message=cancel if peer.hello.role == "node" else end, epoch=self.peers.epoch)
            for peer_id, peer in self.peers.admitted.items()
        ]

    def _tick(self, event: TimePassed, now: float) -> list[Action]:
        actions: list[Action] = []
        if event.late_s >= STOOD_STILL_S:
            self.peers.excuse(late_s=event.late_s, now=now)
            self.dispatch.excuse(late_s=event.late_s, now=now)
        for peer_id in self.peers.lost(now):
            actions += self._lost(peer_id, now, reason=f"silent for {self.config.lost_after_s} s")
        self.dispatch.suspects.are_silent(self.peers.silent(now))
        actions += self._warn_of_no_spare(now)
        actions += self.dispatch.tick(self.peers.members(), epoch=self.peers.epoch, now=now)
        return actions + self.peers.heartbeats(now)

    def _warn_of_no_spare(self, now: float) -> list[Action]:
        """Any node can hold any layer, so two are enough for one to fail. While a cluster gathers there is one, too."""
        if len(self.peers.members()) != 1:
            self._alone_since_s = None
            return []
        if self._alone_since_s is None:
            self._alone_since_s = now
        if self._alone_since_s == inf or now - self._alone_since_s < self.config.lost_after_s:
            return []
        self._alone_since_s = inf
        (only,) = self.peers.members()
        text = f"every layer has one node that can hold it, {only.node_id}: if that fails, requests wait for another"
        return [Note(level="warning", text=text)]
