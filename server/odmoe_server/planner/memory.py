"""Device memory each role needs, and the share of the store each node reads. Counts weights, slots and KV caches.

Activations and what a runtime takes for itself are left out.
"""

from collections import Counter
from dataclasses import dataclass

from odmoe_server.planner.machines import Machines, members
from odmoe_server.planner.shape import Shape
from odmoe_wire import placement


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes. `node` is the largest node's; `store` every node's copy of the experts, of which the one
    that serves most layers reads `store_read_decoding` while decoding."""

    main_bytes: int
    shadow_bytes: int
    node_bytes: int
    nodes_bytes: int
    store_bytes: int
    store_read_decoding_bytes: int
    resident_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.main_bytes + self.shadow_bytes + self.nodes_bytes


def of(shape: Shape, machines: Machines, *, context_tokens: int, shadow: bool = True) -> Memory:
    """What a context of so many tokens needs; with no `shadow`, none is held."""
    kv_bytes = context_tokens * shape.kv_bytes_per_token
    weights_bytes = shape.non_expert_bytes + shape.experts_bytes
    narrower = min(1.0, machines.shadow_bits / shape.weight_bits)
    slots_bytes = [node.slots * shape.expert_bytes for node in machines.nodes]
    nodes, layers = members(machines), shape.layers
    served = Counter(
        node.node_id
        for layer in range(layers)
        for node in placement.group_of(layer, nodes, machines.group_size, layers)
    )
    return Memory(
        main_bytes=shape.non_expert_bytes + kv_bytes,
        shadow_bytes=round(weights_bytes * narrower) + kv_bytes if shadow else 0,
        node_bytes=max(slots_bytes),
        nodes_bytes=sum(slots_bytes),
        store_bytes=shape.experts_bytes,
        store_read_decoding_bytes=max(served.values()) * shape.num_experts * shape.expert_bytes,
        resident_bytes=weights_bytes + kv_bytes,
    )
