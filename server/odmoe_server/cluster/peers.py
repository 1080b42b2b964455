"""Who takes part: hello, view and epoch, life signs. Pure: time comes in as an argument.

Knows nothing of layers, experts or calls. A peer that does not fit is refused with a message that names what
differs on both sides.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from odmoe_server.cluster.events import Action, Note, Send
from odmoe_wire.liveness import Liveness
from odmoe_wire.messages import (
    Heartbeat,
    Hello,
    Member,
    Placing,
    Refused,
    ShadowReport,
    SlotMode,
    SlotReport,
    View,
    Welcome,
)

MAX_DEPARTED = 64
# Life signs that may be overdue before a node gets no new work.
SILENT_HEARTBEATS = 3
# Nodes whose loads take up to this much longer than those of the fastest of them are taken for equal.
LIKE_WITHIN_PERCENT = 25


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """What the server demands of its peers and how it times them. `group_size` is the model's top-k unless the
    operator says otherwise; `mode` is what becomes of an expert in its slot, `placing` how a forecast's experts find
    their nodes. A compute is given between `compute_least_s` and `compute_floor_s` beyond what is expected of it (see
    `Lateness`), and never more than `compute_cap_s`."""

    store_digest: str
    package_version: str
    num_layers: int
    num_experts: int
    group_size: int
    top_k: int = 1
    mode: SlotMode = "on-demand"
    placing: Placing = "span"
    # The only peer that may be the predictor, where keys say who is who; None: anyone may.
    predictor_id: str | None = None
    heartbeat_s: float = 0.25
    lost_after_s: float = 3.0
    compute_least_s: float = 0.1
    compute_floor_s: float = 0.5
    compute_cap_s: float = 30.0
    call_timeout_s: float = 60.0


@dataclass(kw_only=True)
class Peer:
    """An admitted node agent or predictor. Mutated by `Peers` only."""

    hello: Hello
    liveness: Liveness
    heartbeats_sent: int = 0
    report: SlotReport | None = None
    shadow_report: ShadowReport | None = None

    def reported(self, message: SlotReport | ShadowReport) -> None:
        """It told how it is."""
        if isinstance(message, SlotReport):
            self.report = message
        else:
            self.shadow_report = message


@dataclass(kw_only=True)
class Peers:
    """The admitted peers and the epoch, which grows with each change among them."""

    config: ClusterConfig
    epoch: int = 0
    admitted: dict[str, Peer] = field(default_factory=dict)
    # The last known of those who left; they are shown as down until they return.
    departed: dict[str, Peer] = field(default_factory=dict)
    rejoins_total: int = 0
    # What `members` found out last, and in which epoch.
    _members: tuple[int, list[Member]] = (-1, [])

    def members(self) -> list[Member]:
        """Node agents in placement order: by id, so that every role and every restart agrees."""
        if self._members[0] != self.epoch:
            nodes = [peer.hello for peer in self.admitted.values() if peer.hello.role == "node"]
            kind = kinds(hello.load_us for hello in nodes)
            members = [Member(hello.peer_id, hello.slots, kind[hello.load_us]) for hello in nodes]
            self._members = self.epoch, sorted(members, key=lambda member: member.node_id)
        return self._members[1]

    def predictor(self) -> Peer | None:
        """The one predictor, if it is there."""
        return next((peer for peer in self.admitted.values() if peer.hello.role == "predictor"), None)

    def heard(self, peer_id: str, now: float) -> None:
        """Any message is a life sign."""
        self.admitted[peer_id].liveness.heard(now)

    def excuse(self, *, late_s: float, now: float) -> None:
        """We stood still for so long and could not hear anybody."""
        for peer in self.admitted.values():
            peer.liveness.excuse(late_s, now)

    def admit(self, peer_id: str, hello: Hello, now: float) -> list[Action]:
        """Take a peer in, or refuse it. The caller has removed a former incarnation already."""
        reason = self._misfit(peer_id, hello)
        if reason is not None:
            return [
                Send(peer_id=peer_id, message=Refused(reason=reason), epoch=self.epoch),
                Note(level="warning", text=f"refused {_named(hello)}: {reason}"),
            ]
        welcome = Welcome(heartbeat_s=self.config.heartbeat_s, lost_after_s=self.config.lost_after_s)
        known = self.admitted.get(peer_id)
        if known is not None:  # its first welcome was lost on the way; nothing has changed
            known.liveness.heard(now)
            return [Send(peer_id=peer_id, message=welcome, epoch=self.epoch), self._view_for(peer_id)]
        self.epoch += 1
        liveness = Liveness(heartbeat_s=self.config.heartbeat_s, lost_after_s=self.config.lost_after_s, started_s=now)
        self.admitted[peer_id] = Peer(hello=hello, liveness=liveness)
        self.rejoins_total += self.departed.pop(peer_id, None) is not None
        return [
            Send(peer_id=peer_id, message=welcome, epoch=self.epoch),
            *self.announce(),
            Note(level="info", text=f"{_named(hello)} joined (epoch {self.epoch}{_slots(hello)})"),
        ]

    def remove(self, peer_id: str, *, reason: str) -> list[Action]:
        """Forget a peer and tell the others."""
        peer = self.departed[peer_id] = self.admitted.pop(peer_id)
        while len(self.departed) > MAX_DEPARTED:  # ids are the peers' own: bound what they can make us keep
            del self.departed[next(iter(self.departed))]
        self.epoch += 1
        text = f"{_named(peer.hello)} left (epoch {self.epoch}): {reason}"
        return [*self.announce(), Note(level="warning", text=text)]

    def announce(self) -> list[Action]:
        """The present view, to everybody."""
        return [self._view_for(peer_id) for peer_id in self.admitted]

    def lost(self, now: float) -> list[str]:
        """Peers that have been silent for too long."""
        return [peer_id for peer_id, peer in self.admitted.items() if peer.liveness.lost(now)]

    def silent(self, now: float) -> list[str]:
        """Peers of which several life signs are overdue, though they are not given up yet."""
        silence_s = SILENT_HEARTBEATS * self.config.heartbeat_s
        return [peer_id for peer_id, peer in self.admitted.items() if peer.liveness.silence_s(now) >= silence_s]

    def heartbeats(self, now: float) -> list[Action]:
        """Life signs that are due to the peers."""
        beats: list[Action] = []
        for peer_id, peer in self.admitted.items():
            if peer.liveness.due(now):
                peer.liveness.said(now)
                peer.heartbeats_sent += 1
                beat = Heartbeat(count=peer.heartbeats_sent)
                beats.append(Send(peer_id=peer_id, message=beat, epoch=self.epoch))
        return beats

    def missed_view(self, peer_id: str, epoch: int) -> list[Action]:
        """A life sign came under that epoch. Under another than ours, the newest view was lost on the way, or is on
        it."""
        return [] if epoch == self.epoch else [self._view_for(peer_id)]

    def _view_for(self, peer_id: str) -> Send:
        view = View(
            members=self.members(),
            group_size=self.config.group_size,
            mode=self.config.mode,
            placing=self.config.placing,
        )
        return Send(peer_id=peer_id, message=view, epoch=self.epoch)

    def _misfit(self, peer_id: str, hello: Hello) -> str | None:
        """Why this peer cannot be taken in; None when it can."""
        config = self.config
        if hello.peer_id != peer_id:
            return f"the connection is {peer_id!r} but the hello says {hello.peer_id!r}"
        if hello.package_version != config.package_version:
            return f"odmoe {hello.package_version} here, odmoe {config.package_version} at the server: install the same"
        if hello.store_digest != config.store_digest:
            return (
                f"its store has digest {hello.store_digest[:16]}, the server's {config.store_digest[:16]}: "
                "give both the same prepared store"
            )
        if hello.role == "node" and hello.slots < 1:
            return "a node agent needs at least one slot"
        if hello.role == "predictor" and config.predictor_id not in (None, peer_id):
            return f"the key of {peer_id!r} is not the predictor's: only {config.predictor_id!r} may be that"
        predictor = self.predictor()
        if hello.role == "predictor" and predictor is not None and predictor.hello.peer_id != peer_id:
            return f"there is a predictor already: {predictor.hello.peer_id}"
        return None


def _named(hello: Hello) -> str:
    """As a person reads it: "node kitchen", but not "node node-3"."""
    return hello.peer_id if hello.peer_id.startswith(hello.role) else f"{hello.role} {hello.peer_id}"


def _slots(hello: Hello) -> str:
    return f", {hello.slots} slot{'' if hello.slots == 1 else 's'}" if hello.role == "node" else ""


def kinds(load_us: Iterable[int]) -> dict[int, int]:
    """Measured time of a load -> what placement is told: that of the fastest node of its kind, so that equal machines,
    which never measure quite the same, count as equal. 0, not known, stays 0."""
    kind = {0: 0}
    fastest_us = 0
    for us in sorted(set(load_us)):
        if us * 100 > fastest_us * (100 + LIKE_WITHIN_PERCENT):
            fastest_us = us
        kind[us] = fastest_us
    return kind
