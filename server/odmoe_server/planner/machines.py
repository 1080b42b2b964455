"""The machines a plan is made for, and how long each step takes on them. Knows shapes; simulates nothing.

Decoding one sequence is bound by reading weights, so a step takes an overhead and the bytes it reads, over the
device's memory bandwidth. Reading the KV cache, and what a load costs besides its bytes, are left out.
"""

from dataclasses import dataclass, replace

from odmoe_server.planner.shape import Shape
from odmoe_wire.messages import Member


@dataclass(frozen=True, kw_only=True)
class Device:
    """What computes: every role has one. `overhead_s` is what any step takes beside reading its weights."""

    memory_gb_per_s: float
    tflops: float
    overhead_s: float

    def step_s(self, weight_bytes: float, *, params: float, rows: float = 1) -> float:
        """Seconds of a step that reads `weight_bytes` and multiplies `rows` with `params` of them."""
        return self.overhead_s + max(
            weight_bytes / (self.memory_gb_per_s * 1e9), 2 * params * rows / self.tflops / 1e12
        )


@dataclass(frozen=True, kw_only=True)
class Network:
    """Links between machines: a message takes the latency, its bytes over the bandwidth, and `overhead_s` of the
    main node's time. The main node has one message at a time in either direction; others never wait for one
    another."""

    latency_s: float
    gbit_per_s: float
    overhead_s: float = 0.0

    def wire_s(self, size_bytes: float) -> float:
        """Seconds the bytes occupy the link."""
        return size_bytes * 8 / (self.gbit_per_s * 1e9)


@dataclass(frozen=True, kw_only=True)
class Node:
    """One node agent: experts it has room for, and its link from host to device memory."""

    slots: int
    link_gb_per_s: float


@dataclass(frozen=True, kw_only=True)
class Crew:
    """The nodes and how they share the work. With `shared_core` one core computes for the server and all nodes and
    works on their messages, as in `odmoe bench decode`; the predictor has one of its own, and loads need none."""

    nodes: tuple[Node, ...]
    group_size: int
    shared_core: bool = False


@dataclass(frozen=True, kw_only=True)
class Machines(Crew):
    """All of them. `shadow_bits` is the width of the predictor's weights."""

    device: Device
    network: Network
    shadow_bits: float
    # Measured seconds take the place of those that bytes over bandwidth give.
    main_s: float | None = None
    expert_s: float | None = None
    shadow_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of each step of decoding: the main node's part of a layer, one expert, the shadow's layer; a load, for
    each node; the server's with a message of a hidden state; a token's keys and values on the wire; a message's
    latency. `first_stage` is the share of an expert, of its bytes and of its computing, that nodes compute while the
    rest of it is on the link; 0 where they compute when all of it is there."""

    main_s: float
    expert_s: float
    shadow_s: float
    load_s: tuple[float, ...]
    row_s: float
    kv_s: float
    latency_s: float
    first_stage: float = 0.0

    def without(self, what: str) -> "Times":
        """The same with one thing for nothing: `loads`, `network`, `compute` or `shadow`."""
        free = {
            "loads": {"load_s": tuple(0.0 for _ in self.load_s)},
            "network": {"row_s": 0.0, "kv_s": 0.0, "latency_s": 0.0},
            "compute": {"main_s": 0.0, "expert_s": 0.0},
            "shadow": {"shadow_s": 0.0},
        }
        return replace(self, **free[what])  # type: ignore[arg-type]  # each value fits its field


def times(shape: Shape, machines: Machines) -> Times:
    """How long each step of decoding takes for this model on these machines."""
    device, network = machines.device, machines.network
    item_bytes = shape.weight_bits / 8
    layer_bytes = shape.main_bytes / shape.layers
    active_bytes = layer_bytes + shape.top_k * shape.expert_bytes
    narrower = min(1.0, machines.shadow_bits / shape.weight_bits)
    derived = (
        device.step_s(layer_bytes, params=layer_bytes / item_bytes),
        device.step_s(shape.expert_bytes, params=shape.expert_bytes / item_bytes),
        device.step_s(active_bytes * narrower, params=active_bytes / item_bytes),
    )
    measured = (machines.main_s, machines.expert_s, machines.shadow_s)
    main_s, expert_s, shadow_s = (d if m is None else m for d, m in zip(derived, measured, strict=True))
    return Times(
        main_s=main_s,
        expert_s=expert_s,
        shadow_s=shadow_s,
        load_s=tuple(shape.expert_bytes / (node.link_gb_per_s * 1e9) for node in machines.nodes),
        row_s=network.overhead_s + network.wire_s(shape.row_bytes),
        kv_s=network.wire_s(shape.kv_bytes_per_token),
        latency_s=network.latency_s,
    )


def members(crew: Crew) -> list[Member]:
    """The nodes as placement sees them; each one's id is its index. Of their loads it compares only how long they take,
    so a load here is one of 1 GB."""
    return [
        Member(node_id=str(index), slots=node.slots, load_us=max(1, round(1e6 / node.link_gb_per_s)))
        for index, node in enumerate(crew.nodes)
    ]
