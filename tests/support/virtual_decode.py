"""Decoding in virtual time on nodes of unlike links: how long a token takes, loads, computes and waits counted.

Forecasts are right and known long before. A node has one link, which loads in the order of need, and frees a slot when
its expert is computed. Messages take no time.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from odmoe_wire.messages import Member
from odmoe_wire.placement import place


@dataclass
class _Node:
    load_us: int
    slots_free_us: deque[int]
    link_free_us: int = 0
    device_free_us: int = 0
    served: int = field(default=0)

    def serve(self, gate_us: int, *, expert_us: int) -> int:
        """When the next expert this node was told of is computed, its rows having come at `gate_us`."""
        begun_us = max(self.link_free_us, self.slots_free_us.popleft())
        self.link_free_us = begun_us + self.load_us
        self.device_free_us = max(gate_us, self.link_free_us, self.device_free_us) + expert_us
        self.slots_free_us.append(self.device_free_us)
        self.served += 1
        return self.device_free_us


def token_us(
    nodes: Sequence[Member],
    *,
    told: Sequence[Member],
    top_k: int,
    num_layers: int,
    main_us: int,
    expert_us: int,
    tokens: int = 40,
) -> float:
    """Microseconds a token takes once all is under way. `nodes` are what they are, `told` is what placement is told
    of them."""
    run = {node.node_id: _Node(node.load_us, deque([0] * node.slots)) for node in nodes}
    now_us = 0
    ends_us = []
    for _ in range(tokens):
        for layer in range(num_layers):
            gate_us = now_us + main_us
            placed = place(layer, range(top_k), told, top_k, num_layers)
            now_us = max(run[node_id].serve(gate_us, expert_us=expert_us) for node_id in placed.values())
        ends_us.append(now_us)
    half = tokens // 2
    return (ends_us[-1] - ends_us[half - 1]) / (tokens - half)
