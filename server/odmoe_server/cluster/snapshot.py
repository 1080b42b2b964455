"""An immutable picture of the cluster for readers on other threads. Knows the state's fields, decides nothing."""

from dataclasses import dataclass

from odmoe_server.cluster.peers import Peer
from odmoe_server.cluster.state import ClusterState
from odmoe_server.engine_api import NodeHealth
from odmoe_wire.messages import Wants


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

    @property
    def num_nodes_alive(self) -> int:
        """Node agents that take part now."""
        return sum(peer.alive and peer.role == "node" for peer in self.peers)


def snapshot_of(state: ClusterState, *, protocol_errors: int) -> ClusterSnapshot:
    """The state as it is now; to be called on the thread that owns it."""
    predictor = state.peers.predictor()
    present = [_health(peer, alive=True) for peer in state.peers.admitted.values()]
    gone = [_health(peer, alive=False) for peer in state.peers.departed.values()]
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
    )


def _health(peer: Peer, *, alive: bool) -> NodeHealth:
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
    )
