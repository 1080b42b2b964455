"""An immutable picture of the cluster for readers on other threads. Knows the state's fields, decides nothing."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from odmoe_server.cluster.peers import Peer
from odmoe_server.cluster.state import ClusterState
from odmoe_server.engine_api import ClusterFigures, NodeHealth, Spread
from odmoe_wire.messages import LOAD_BOUNDS_S, ShadowReport, SlotReport, Wants

STORY_SHOWN = 30


@dataclass(frozen=True, kw_only=True)
class ClusterSnapshot:
    """`peers` has nodes that were seen once and are gone as not alive."""

    epoch: int
    predictor_incarnation: int | None
    predictor_wants: Wants
    peers: tuple[NodeHealth, ...]
    failovers_total: int
    predicted_late_total: int
    rejoins_total: int
    stale_total: int
    protocol_errors_total: int
    figures: ClusterFigures

    @property
    def num_nodes_alive(self) -> int:
        """Node agents that take part now."""
        return sum(peer.alive and peer.role == "node" for peer in self.peers)


def snapshot_of(
    state: ClusterState, *, protocol_errors: int, bad_messages: Mapping[str, int], loop_errors: int, now: float
) -> ClusterSnapshot:
    """The state as it is now; to be called on the thread that owns it. `bad_messages`: those of each peer that were not
    accepted; `protocol_errors`: those of all, and of whoever had no name."""
    predictor = state.peers.predictor()

    def health(peer: Peer, *, alive: bool) -> NodeHealth:
        peer_id = peer.hello.peer_id
        rpc_times = state.ledger.rpc(peer_id)
        return _health(peer, alive=alive, rpc_times=rpc_times, bad_messages=bad_messages.get(peer_id, 0))

    present = [health(peer, alive=True) for peer in state.peers.admitted.values()]
    gone = [health(peer, alive=False) for peer in state.peers.departed.values()]
    return ClusterSnapshot(
        epoch=state.peers.epoch,
        predictor_incarnation=None if predictor is None else predictor.hello.incarnation,
        predictor_wants="cache" if predictor is None else predictor.hello.wants,
        peers=tuple(sorted(present + gone, key=lambda peer: peer.peer_id)),
        failovers_total=state.dispatch.failovers_total,
        predicted_late_total=state.dispatch.predicted_late_total,
        rejoins_total=state.peers.rejoins_total,
        stale_total=state.stale_total,
        protocol_errors_total=protocol_errors,
        figures=_figures(state, loop_errors=loop_errors, now=now),
    )


def _figures(state: ClusterState, *, loop_errors: int, now: float) -> ClusterFigures:
    ledger, dispatch = state.ledger, state.dispatch
    return ClusterFigures(
        epoch=state.peers.epoch,
        rejoins_total=state.peers.rejoins_total,
        stale_total=state.stale_total,
        duplicates_total=dispatch.duplicates_total,
        realigns_total=ledger.realigns_total,
        loop_errors_total=loop_errors,
        lead_layers=ledger.lead_layers(dispatch.forecasts),
        layers=ledger.outcomes(),
        story=tuple((now - at_s, text) for at_s, text in list(state.story)[-STORY_SHOWN:]),
    )


def _health(peer: Peer, *, alive: bool, rpc_times: Spread | None, bad_messages: int) -> NodeHealth:
    report = peer.report
    return NodeHealth(
        peer_id=peer.hello.peer_id,
        role=peer.hello.role,
        alive=alive,
        slots=peer.hello.slots,
        used_slots=report.used_slots if report and alive else 0,
        accounted_bytes=report.accounted_bytes if report and alive else 0,
        budget_bytes=peer.hello.budget_bytes,
        rss_bytes=report.rss_bytes if report and alive else 0,
        loads_total=report.loads_total if report else 0,
        loads_unused_total=report.loads_unused_total if report else 0,
        load_bytes_total=report.load_bytes_total if report else 0,
        load_s_total=report.load_s_total if report else 0.0,
        compute_s_total=report.compute_s_total if report else 0.0,
        rpc_times=rpc_times,
        bad_messages_total=bad_messages,
        **_of_a_node(report),
        **_of_the_predictor(peer.shadow_report),
    )


def _of_a_node(report: SlotReport | None) -> dict[str, Any]:
    if report is None:
        return {"load_times": Spread(bounds=LOAD_BOUNDS_S, counts=(0,) * (len(LOAD_BOUNDS_S) + 1), sum=0.0)}
    return {
        "load_times": Spread(bounds=LOAD_BOUNDS_S, counts=tuple(report.load_counts), sum=report.load_s_total),
        **{name: getattr(report, name) for name in _OF_A_NODE},
    }


def _of_the_predictor(report: ShadowReport | None) -> dict[str, Any]:
    return {} if report is None else {name: getattr(report, name) for name in _OF_THE_PREDICTOR}


# Reported and shown under the same names.
_OF_A_NODE = (
    "loads_failed_total",
    "loads_cancelled_total",
    "loads_broken_off_total",
    "broken_off_s_total",
    "evictions_total",
    "late_forecasts_total",
    "stale_total",
    "duplicates_total",
    "expired_total",
    "overflowed_total",
    "undelivered_total",
    "loop_errors_total",
    "protocol_errors_total",
)
_OF_THE_PREDICTOR = (
    "forecasts_total",
    "undelivered_total",
    "rebirths_total",
    "loop_errors_total",
    "protocol_errors_total",
)
