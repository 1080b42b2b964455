"""Puts the engine together: store, model, cluster, decode loop. The only place in the server that knows all four."""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import zmq
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from odmoe_model.kvcache import new_cache
from odmoe_model.routers import routers_of
from odmoe_model.seam import install
from odmoe_model.skeleton import load_generation_config, load_skeleton
from odmoe_model.store import ExpertStore
from odmoe_server.cluster.driver import ClusterDriver
from odmoe_server.cluster.peers import ClusterConfig
from odmoe_server.cluster.state import ClusterState
from odmoe_server.cluster.timeline import Mark
from odmoe_server.engine.align import Periods
from odmoe_server.engine.kv import default_budget_bytes, measure_kv
from odmoe_server.engine.loop import DecodeLoop, EngineLimits, Loaded
from odmoe_server.engine.recordings import Recordings
from odmoe_server.engine.step import Stepper
from odmoe_server.engine_api import GenerationRequest
from odmoe_server.importance.dial import effective_alpha
from odmoe_server.importance.host import HostExperts
from odmoe_server.importance.mode import Importance
from odmoe_server.importance.options import ImportanceOptions
from odmoe_server.moe.lanes import meet
from odmoe_server.moe.remote import RemoteExperts
from odmoe_server.moe.rows import Rows
from odmoe_server.moe.trace import RoutedCall
from odmoe_server.recording import Sink
from odmoe_wire.checks import Limits
from odmoe_wire.keys import CurveKeys
from odmoe_wire.lifeline import settle_heap
from odmoe_wire.link import Link, RouterLink
from odmoe_wire.messages import SlotMode, ToServer


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """`group_size` None is as many nodes as a step may need experts of a layer. `max_context` cuts the model's own
    context length. `prefill_chunk`: most tokens of a prompt that go through the model at once; None takes every prompt
    whole. `draft`: most guesses of the shadow verified in one step. `kv_memory_bytes`: for keys and values of all
    sequences; None takes a share of what is free. `spans` gets what happens, as the timeline does."""

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
    prefill_chunk: int | None = 256
    slot_mode: SlotMode = "on-demand"
    draft: int = 0
    max_running: int = 16
    kv_memory_bytes: int | None = None
    prefix_cache: bool = True
    importance: ImportanceOptions | None = None
    spans: Sink[Mark] | None = None


def cluster_config(store: ExpertStore, options: EngineOptions) -> ClusterConfig:
    """What the server demands of its peers for this store."""
    manifest = store.manifest
    return ClusterConfig(
        store_digest=manifest.digest,
        package_version=version("odmoe"),
        num_layers=manifest.num_moe_layers,
        num_experts=manifest.num_experts,
        group_size=options.group_size or min(manifest.num_experts, manifest.top_k * (1 + options.draft)),
        top_k=manifest.top_k,
        mode=options.slot_mode if options.importance is None else "importance",
        # Guesses and their forecasts come several at a time: those that name one expert must meet at one node.
        placing="expert" if options.draft else "span",
        # Nodes know the predictor by that key; a node's key must not hear what only the predictor is told.
        predictor_id="predictor" if options.keys else None,
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
        max_running=options.max_running,
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
    importance = None if options.importance is None else _importance(store, options.importance, model, cluster)
    experts = RemoteExperts(
        cluster=cluster,
        traces=trace is not None,
        importance=importance,
        expert_bytes=store.manifest.record_bytes,
    )
    install(model, meet)
    settle_heap()

    def empty_cache() -> DynamicCache:
        # Windows and states that can go back are larger, so only who guesses has them.
        return new_cache(model.config) if options.draft else DynamicCache(config=model.config)

    kv_bytes = options.kv_memory_bytes
    return Loaded(
        stepper=Stepper(
            model,
            meeting=experts,
            cluster=cluster,
            total=experts.total,
            periods=options.periods,
            trace=trace,
            rows=Rows.tried(model, empty_cache),
        ),
        new_cache=empty_cache,
        total=experts.total,
        kv_size=measure_kv(model, empty_cache),
        kv_budget_bytes=default_budget_bytes(options.device) if kv_bytes is None else kv_bytes,
        prefill_chunk=None if turns_with_length(model.config) else options.prefill_chunk,
        draft=options.draft,
        prefix_cache=options.prefix_cache,
        alpha_of=lambda request: _alpha(request, options.importance),
    )


def _importance(
    store: ExpertStore, options: ImportanceOptions, model: PreTrainedModel, cluster: ClusterDriver
) -> Importance:
    family = store.manifest.model_type
    return Importance(
        options,
        routers=routers_of(model, family=family),
        family=family,
        num_experts=store.manifest.num_experts,
        residency=cluster.state.residency,
        fetch=cluster.fetch,
        forecast=cluster.forecast,
        host=HostExperts(store) if options.cpu_share else None,
    )


def _alpha(request: GenerationRequest, options: ImportanceOptions | None) -> float:
    """How far a request's experts may be replaced; see `GenerationRequest`."""
    if options is None:
        return 0.0
    return effective_alpha(request.alpha, default=options.alpha, cap=options.max_alpha)


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
        self._recordings = Recordings.open(
            store.manifest, timeline_file=options.timeline, trace_file=options.trace, spans=options.spans
        )
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
