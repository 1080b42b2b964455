"""The machines a plan is made for, and how long each step takes on them. Knows shapes; simulates nothing.

Decoding one sequence is bound by reading weights, so a step takes an overhead and the bytes it reads, over the
device's memory bandwidth. Reading the KV cache, and what a load costs besides its bytes, are left out.
"""

from dataclasses import dataclass, replace

from odmoe_server.planner.shape import Shape


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
    """Links between machines: a message takes the latency, and its bytes over the bandwidth. The main node's link
    carries one message at a time in either direction; others never wait for one another."""

    latency_s: float
    gbit_per_s: float

    def wire_s(self, size_bytes: float) -> float:
        """Seconds the bytes occupy the link."""
        return size_bytes * 8 / (self.gbit_per_s * 1e9)


@dataclass(frozen=True, kw_only=True)
class Node:
    """One node agent: experts it has room for, and its link from host to device memory."""

    slots: int
    link_gb_per_s: float


@dataclass(frozen=True, kw_only=True)
class Machines:
    """All of them. `shadow_bits` is the width of the predictor's weights."""

    nodes: tuple[Node, ...]
    group_size: int
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
    each node; a hidden state on the wire; a token's keys and values on the wire; a message's latency."""

    main_s: float
    expert_s: float
    shadow_s: float
    load_s: tuple[float, ...]
    row_s: float
    kv_s: float
    latency_s: float

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
        row_s=network.wire_s(shape.row_bytes),
        kv_s=network.wire_s(shape.kv_bytes_per_token),
        latency_s=network.latency_s,
    )
