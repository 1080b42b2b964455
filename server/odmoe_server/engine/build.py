"""Puts the engine together: store, model, cluster, decode loop. The only place in the server that knows all four."""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import zmq
from transformers import DynamicCache, PreTrainedConfig

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
from odmoe_server.moe.trace import RoutedCall
from odmoe_wire.checks import Limits
from odmoe_wire.keys import CurveKeys
from odmoe_wire.lifeline import settle_heap
from odmoe_wire.link import Link, RouterLink
from odmoe_wire.messages import SlotMode, ToServer


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """`group_size` None is the model's top-k. `max_context` cuts the model's own context length. `prefill_chunk`:
    most tokens of a prompt that go through the model at once; None takes every prompt whole."""

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
    prefill_chunk: int | None = 512
    slot_mode: SlotMode = "on-demand"


def cluster_config(store: ExpertStore, options: EngineOptions) -> ClusterConfig:
    """What the server demands of its peers for this store."""
    manifest = store.manifest
    return ClusterConfig(
        store_digest=manifest.digest,
        package_version=version("odmoe"),
        num_layers=manifest.num_moe_layers,
        num_experts=manifest.num_experts,
        group_size=options.group_size or manifest.top_k,
        top_k=manifest.top_k,
        mode=options.slot_mode,
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
    trace: Callable[[RoutedCall], None] | None = None,
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
        prefill_chunk=None if turns_with_length(model.config) else options.prefill_chunk,
    )


def turns_with_length(config: PreTrainedConfig) -> bool:
    """Whether a position's rotary embedding depends on how long the prompt is (dynamic and long RoPE). Then the
    first chunk's keys would be turned otherwise than in a forward of the whole prompt, so it has to go in one piece."""
    return bool(_rope_types(config.get_text_config().to_dict()) & {"dynamic", "longrope"})


def _rope_types(values: dict[str, Any]) -> set[str]:
    """Of a configuration or a part of it: some families have a RoPE for each type of layer."""
    types = {value for name, value in values.items() if name in ("rope_type", "type") and isinstance(value, str)}
    return types.union(*(_rope_types(value) for value in values.values() if isinstance(value, dict)))


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
