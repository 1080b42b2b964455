"""The predictor's side of every conversation: with its server and with the node agents. One thread, never blocks.

Says hello until it is welcomed, keeps life signs both ways, passes orders to the mailbox and forecasts from it.
Knows nothing of how forecasts are made. When the server is lost, or a sequence went wrong, it comes back under a new
incarnation: the server then begins every sequence with it anew.
"""

import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from odmoe_predictor.mailbox import Forecast, Mailbox, Order, OrderMessage
from odmoe_wire.codec import Blob, Received
from odmoe_wire.homes import placed
from odmoe_wire.link import Link, PeerGone
from odmoe_wire.liveness import Liveness
from odmoe_wire.messages import (
    Align,
    AnyMessage,
    Bye,
    End,
    Heartbeat,
    Hello,
    ProtocolErrorNotice,
    Refused,
    Rollback,
    Routed,
    Schedule,
    ShadowReport,
    Start,
    View,
    Welcome,
)
from odmoe_wire.placement import group_of
from odmoe_wire.session import Session
from odmoe_wire.sharing import Sharing

log = logging.getLogger(__name__)

SERVER: Final = "server"
# What a link of ours accepts: from the server, and from node agents.
FromServer = Welcome | Refused | View | Start | Align | Routed | End | Heartbeat | Bye | ProtocolErrorNotice
FromNode = Hello | Heartbeat | Bye | ProtocolErrorNotice

MAX_BURST: Final = 256  # messages taken from one link before forecasts and life signs have their turn
MAX_NODES: Final = 4096
HELLO_EVERY_S: Final = 0.25
# After a sequence went wrong; a sequence that always does must not have us come and go with every token.
REBIRTH_EVERY_S: Final = 5.0
# For nodes that come before the server has said what it wants.
DEFAULT_PACE: Final = Welcome(heartbeat_s=0.25, lost_after_s=1.5)


class RefusedError(Exception):
    """The server does not take this predictor in; the text is the server's reason."""


@dataclass
class SwitchboardCounters:
    """`unsent`: schedules and rollbacks whose receiver was not there. `refused`: orders there was no room for.
    `loop_errors`: events on which the thread of the links failed."""

    schedules: int = 0
    rollbacks: int = 0
    unsent: int = 0
    refused: int = 0
    rebirths: int = 0
    loop_errors: int = 0


@dataclass
class Node:
    """A node agent that said hello."""

    liveness: Liveness
    heartbeats: int = 0


class Switchboard:
    """`hello` is what to tell the server; its incarnation is drawn here. `num_layers` is the model's: what a group of
    nodes serves depends on it."""

    def __init__(
        self,
        hello: Hello,
        *,
        server: Link,
        nodes: Link,
        mailbox: Mailbox,
        num_layers: int,
        now: float,
        draw_incarnation: Callable[[], int] = lambda: secrets.randbits(62),
    ) -> None:
        self.counters = SwitchboardCounters()
        self.epoch = 0
        self._server = server
        self._node_link = nodes
        self._mailbox = mailbox
        self._num_layers = num_layers
        self._draw_incarnation = draw_incarnation
        self._hello = msgspec.structs.replace(hello, incarnation=draw_incarnation())
        self._last_birth_s = now
        self._pace = DEFAULT_PACE
        self._session = Session(hello_every_s=HELLO_EVERY_S, now=now)
        self._troubled = False
        self._heartbeats = 0
        self._view = View(members=[], group_size=1)
        self._sharing = Sharing()
        self._nodes: dict[str, Node] = {}

    @property
    def joined(self) -> bool:
        """Whether the server has taken us in."""
        return self._session.is_joined

    @property
    def nodes(self) -> list[str]:
        """Ids of the node agents that are there."""
        return sorted(self._nodes)

    def pump(self, now: float) -> bool:
        """Do all that waits; true if there was anything. Raises RefusedError."""
        busy = self.send_forecasts()
        busy = self._take(self._server, lambda _, received: self._from_server(received, now)) or busy
        busy = self._take(self._node_link, lambda node_id, received: self._from_node(node_id, received, now)) or busy
        self._mind_troubles(now)
        self._keep_up_with_server(now)
        self._keep_up_with_nodes(now)
        return busy

    def send_forecasts(self) -> bool:
        """Send what was forecast and what is void, in order; true if there was anything."""
        words = self._mailbox.words()
        for word in words:
            if isinstance(word, Rollback):
                self._void(word)
            else:
                self._spread(word)
        return bool(words)

    def wait_s(self, now: float) -> float:
        """How long nothing will be due."""
        waits_s = [node.liveness.wait_s(now) for node in self._nodes.values()]
        waits_s.append(self._session.wait_s(now))
        return min(waits_s)

    def report(self) -> ShadowReport:
        """What we have done since our start."""
        counters = self.counters
        return ShadowReport(
            forecasts_total=counters.schedules,
            rollbacks_total=counters.rollbacks,
            undelivered_total=counters.unsent,
            refused_total=counters.refused,
            rebirths_total=counters.rebirths,
            protocol_errors_total=self._server.protocol_errors + self._node_link.protocol_errors,
            loop_errors_total=counters.loop_errors,
        )

    def leave(self, reason: str) -> None:
        """Say goodbye to everybody."""
        self._send(self._server, SERVER, Bye(reason=reason))
        for node_id in self._nodes:
            self._send(self._node_link, node_id, Bye(reason=reason))

    def _take(self, link: Link, handle: Callable[[str, Received], None]) -> bool:
        for taken in range(MAX_BURST):
            item = link.receive()
            if item is None:
                return taken > 0
            handle(*item)
        return True

    # ----------------------------------------------------------------------------- with the server

    def _from_server(self, received: Received, now: float) -> None:
        was_joined = self.joined
        self._session.heard(received.message, now)
        match received.message:
            case Welcome() as welcome:
                if not was_joined:
                    log.info("connected to the server as %s", self._hello.peer_id)
                    self._pace = welcome
            case View() as view:
                if (view, received.epoch) != (self._view, self.epoch):  # else it was only said again
                    self._sharing.clear()
                self._view, self.epoch = view, received.epoch
            case Start() | Align() | Routed() | End() as message:
                self._order(message, received.blobs)
            case Refused(reason=reason):
                raise RefusedError(reason)
            case Bye(reason=reason):
                # To whom it does not know it says so at every message.
                log.log(logging.WARNING if was_joined else logging.DEBUG, "the server says bye: %s", reason)
                self._rejoin(now)
            case ProtocolErrorNotice(reason=reason):
                log.warning("the server did not accept a message: %s", reason)
            case _:  # heartbeats have served as life signs
                pass

    def _order(self, message: OrderMessage, blobs: tuple[Blob, ...]) -> None:
        if not self.joined:  # it can only be meant for what we were
            return
        if isinstance(message, Routed) and self._hello.wants == "cache+inputs":
            corrects = self._next_turn(message.layer)
            if corrects is not None:
                self.counters.refused += not self._mailbox.order(Order(message, blobs, corrects=corrects))
        elif not self._mailbox.order(Order(message, blobs)):
            self.counters.refused += 1
            self._troubled = True

    def _next_turn(self, layer: int) -> int | None:
        """The layer for which the nodes that serve this one are to load next; None when there is none."""
        members, group_size = self._view.members, self._view.group_size
        group = group_of(layer, members, group_size, self._num_layers)
        later = range(layer + 1, self._num_layers)
        return next((at for at in later if group_of(at, members, group_size, self._num_layers) == group), None)

    def _keep_up_with_server(self, now: float) -> None:
        if self._session.check_lost(now):
            log.warning("the server is silent; saying hello until it returns")
            self._rejoin(now)
            return
        due = self._session.due(now)
        if due == "hello":
            self._send(self._server, SERVER, self._hello)
        elif due == "heartbeat":
            self._send(self._server, SERVER, Heartbeat(count=self._heartbeats))
            self._heartbeats += 1
            self._send(self._server, SERVER, self.report())
        if due is not None:
            self._session.said(now)

    def _mind_troubles(self, now: float) -> None:
        for reason in self._mailbox.troubles():
            log.warning("dropped a sequence: %s", reason)
            self._send(self._server, SERVER, ProtocolErrorNotice(reason=reason))
            self._troubled = True
        if self._troubled and now >= self._last_birth_s + REBIRTH_EVERY_S:
            self._rejoin(now)

    def _rejoin(self, now: float) -> None:
        """Forget every sequence and say hello as one who knows none."""
        self.counters.rebirths += 1
        self._mailbox.forget_all()
        self._hello = msgspec.structs.replace(self._hello, incarnation=self._draw_incarnation())
        self._session.rejoin(now)
        self._sharing.clear()
        self._troubled = False
        self._last_birth_s = now

    # ------------------------------------------------------------------------------- with the nodes

    def _from_node(self, node_id: str, received: Received, now: float) -> None:
        node = self._nodes.get(node_id)
        if node is not None:
            node.liveness.heard(now)
        match received.message:
            case Hello():
                self._admit(node_id, now)
            case Bye():
                self._nodes.pop(node_id, None)
            case ProtocolErrorNotice(reason=reason):
                log.warning("node %s did not accept a message: %s", node_id, reason)
            case _:
                if node is None:
                    # It takes us for somebody we no longer are: let it say hello.
                    self._send(self._node_link, node_id, Bye(reason="this predictor does not know you"))

    def _admit(self, node_id: str, now: float) -> None:
        """Judging nodes is the server's business: only those in its view get schedules."""
        if node_id in self._nodes or len(self._nodes) < MAX_NODES:
            self._nodes[node_id] = Node(Liveness(self._pace.heartbeat_s, self._pace.lost_after_s, now))
            self._send(self._node_link, node_id, self._pace)

    def _keep_up_with_nodes(self, now: float) -> None:
        for node_id, node in list(self._nodes.items()):
            if node.liveness.lost(now):
                log.info("node %s is silent", node_id)
                del self._nodes[node_id]
            elif node.liveness.due(now):
                self._send(self._node_link, node_id, Heartbeat(count=node.heartbeats))
                node.heartbeats += 1
                node.liveness.said(now)

    # ----------------------------------------------------------------------------------- schedules

    def _spread(self, forecast: Forecast) -> None:
        """To each node of the layer's group its share, to the server the whole and the tokens. In mode "importance" the
        server decides what is loaded ahead, so nodes hear nothing."""
        # A node that has no share any more has to hear so.
        before = self._before(forecast)
        shares: dict[str, list[int]] = {node_id: [] for node_id in before.values()}
        for expert, node_id in self._dealt(forecast).items():
            shares.setdefault(node_id, []).append(expert)
        for node_id, experts in shares.items():
            schedule = Schedule(span=forecast.span, layer=forecast.layer, experts=experts)
            self._count(schedule, node_id in self._nodes and self._send(self._node_link, node_id, schedule))
        tokens = list(forecast.tokens)
        schedule = Schedule(span=forecast.span, layer=forecast.layer, experts=forecast.experts, tokens=tokens)
        self._count(schedule, self._send(self._server, SERVER, schedule))

    def _before(self, forecast: Forecast) -> Mapping[int, str]:
        """Expert -> node of the forecast that this one replaces."""
        if not forecast.instead:
            return {}
        return self._sharing.where(forecast.span, forecast.layer) or self._placed(forecast.layer, forecast.instead)

    def _dealt(self, forecast: Forecast) -> Mapping[int, str]:
        """Expert -> node."""
        view = self._view
        if view.mode != "on-demand" or view.placing != "span":
            return self._placed(forecast.layer, forecast.experts)
        return self._sharing.deal(
            forecast.span,
            forecast.layer,
            forecast.experts,
            view.members,
            group_size=view.group_size,
            num_layers=self._num_layers,
        )

    def _void(self, rollback: Rollback) -> None:
        """To the server and to every node of the view: any of them may have been told of some layer."""
        for member in self._view.members:
            here = member.node_id in self._nodes
            self._count(rollback, here and self._send(self._node_link, member.node_id, rollback))
        self._count(rollback, self._send(self._server, SERVER, rollback))

    def _placed(self, layer: int, experts: Sequence[int]) -> dict[int, str]:
        view = self._view
        if view.mode == "importance":
            return {}
        return placed(
            layer,
            experts,
            view.members,
            view.group_size,
            mode=view.mode,
            num_layers=self._num_layers,
            placing=view.placing,
        )

    def _count(self, message: Schedule | Rollback, sent: bool) -> None:
        self.counters.schedules += sent and isinstance(message, Schedule)
        self.counters.rollbacks += sent and isinstance(message, Rollback)
        self.counters.unsent += not sent

    def _send(self, link: Link, peer: str, message: AnyMessage) -> bool:
        """Whether it is on its way; a peer that is gone will be noticed by its silence."""
        try:
            link.send(peer, message, epoch=self.epoch)
        except PeerGone as error:
            log.debug("not sent: %s to %s", type(message).__name__, error)
            return False
        return True
