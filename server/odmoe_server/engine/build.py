"""Puts the engine together: store, model, cluster, decode loop. The only place in the server that knows all four."""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
import zmq
from transformers import DynamicCache

from odmoe_model.seam import install
from odmoe_model.skeleton import load_generation_config, load_skeleton
from odmoe_model.store import ExpertStore
from odmoe_server.cluster.driver import ClusterDriver
from odmoe_server.cluster.peers import ClusterConfig
from odmoe_server.cluster.state import ClusterState
from odmoe_server.engine.align import Periods
from odmoe_server.engine.loop import DecodeLoop, EngineLimits, Loaded
from odmoe_server.engine.recordings import Recordings
from odmoe_server.engine.step import Stepper
from odmoe_server.moe.remote import RemoteExperts, Tally
from odmoe_server.moe.trace import Routed
from odmoe_wire.checks import Limits
from odmoe_wire.keys import CurveKeys
from odmoe_wire.lifeline import settle_heap
from odmoe_wire.link import Link, RouterLink
from odmoe_wire.messages import ToServer


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """`group_size` None is the model's top-k. `max_context` cuts the model's own context length."""

    endpoint: str
    device: str = "cpu"
    threads: int = 1
    group_size: int | None = None
    max_queued: int = 64
    max_context: int | None = None
    heartbeat_s: float = 0.25
    lost_after_s: float = 3.0
    call_timeout_s: float = 60.0
    periods: Periods = field(default_factory=Periods)
    keys: CurveKeys | None = None
    timeline: Path | None = None
    trace: Path | None = None


def cluster_config(store: ExpertStore, options: EngineOptions) -> ClusterConfig:
    """What the server demands of its peers for this store."""
    manifest = store.manifest
    return ClusterConfig(
        store_digest=manifest.digest,
        package_version=version("odmoe"),
        num_layers=manifest.num_moe_layers,
        num_experts=manifest.num_experts,
        group_size=options.group_size or manifest.top_k,
        heartbeat_s=options.heartbeat_s,
        lost_after_s=options.lost_after_s,
        call_timeout_s=options.call_timeout_s,
    )


def bind_cluster(
    store: ExpertStore, options: EngineOptions, *, context: "zmq.Context[zmq.Socket[bytes]]"
) -> RouterLink:
    """The link nodes and predictor connect to. Raises EndpointError or KeysError."""
    manifest = store.manifest
    limits = Limits(num_layers=manifest.num_moe_layers, num_experts=manifest.num_experts)
    return RouterLink.bind(options.endpoint, context=context, accept=ToServer, limits=limits, keys=options.keys)


def engine_limits(store: ExpertStore, options: EngineOptions) -> EngineLimits:
    """Context length and end tokens, as the checkpoint has them."""
    model_length = int(store.manifest.config.get("max_position_embeddings", 1 << 20))
    end_ids = load_generation_config(store).eos_token_id
    if end_ids is None:
        end_ids = []
    return EngineLimits(
        context_length=min(model_length, options.max_context or model_length),
        end_ids=frozenset([end_ids] if isinstance(end_ids, int) else end_ids),
        max_queued=options.max_queued,
    )


def load_model(
    store: ExpertStore,
    options: EngineOptions,
    *,
    cluster: ClusterDriver,
    trace: Callable[[Routed], None] | None = None,
) -> Loaded:
    """Load all weights but the experts' and put the cluster into the experts' place."""
    torch.set_num_threads(options.threads)
    model = load_skeleton(store, device=options.device)
    experts, total = RemoteExperts(cluster=cluster, trace=trace), Tally()
    install(model, experts)
    settle_heap()
    return Loaded(
        stepper=Stepper(model, experts=experts, cluster=cluster, total=total, periods=options.periods),
        new_cache=lambda: DynamicCache(config=model.config),
        total=total,
    )


class ServingEngine(DecodeLoop):
    """A decode loop with its cluster, started and stopped as one."""

    def __init__(self, store: ExpertStore, options: EngineOptions, *, link: Link) -> None:
        self._recordings = Recordings.open(store.manifest, timeline_file=options.timeline, trace_file=options.trace)
        cluster = ClusterDriver(
            ClusterState(config=cluster_config(store, options)), link=link, timeline=self._recordings.timeline
        )
        super().__init__(
            cluster=cluster,
            limits=engine_limits(store, options),
            load=lambda: load_model(store, options, cluster=cluster, trace=self._recordings.trace),
        )

    def start(self) -> None:
        """Begin to listen for nodes and to load the weights."""
        self._recordings.start()
        self._cluster.start()
        super().start()

    def stop(self, *, timeout_s: float = 10.0) -> None:
        """End the decode loop first, then say goodbye to the peers, then finish what was written on the side."""
        super().stop(timeout_s=timeout_s)
        self._cluster.stop()
        self._recordings.close()


def build_engine(
    store: ExpertStore, options: EngineOptions, *, context: "zmq.Context[zmq.Socket[bytes]]"
) -> ServingEngine:
    """The engine, its endpoint bound and nothing started. Raises EndpointError or KeysError."""
    return ServingEngine(store, options, link=bind_cluster(store, options, context=context))
