"""Time to the first token: a prompt goes through all layers, whose experts are spread over all nodes.

Closed form, no events: no forecasts are involved. Routing is taken to be even over the experts of a layer.
"""

from math import ceil

from odmoe_server.planner.machines import Machines
from odmoe_server.planner.shape import Shape


def active_experts(shape: Shape, prompt_tokens: int) -> float:
    """How many of a layer's experts a prompt is expected to need when every expert is as likely as any other."""
    return float(shape.num_experts * (1 - (1 - shape.top_k / shape.num_experts) ** prompt_tokens))


def prefill_s(shape: Shape, machines: Machines, *, prompt_tokens: int, overlap: bool) -> float:
    """Seconds from the prompt to the first token.

    Without `overlap` a layer is routed, sent, loaded, computed and brought back one after the other, as the paper's
    times show it; with it, a layer's loads begin as soon as the slots are free of the layer before."""
    device, network, nodes = machines.device, machines.network, machines.nodes
    item_bytes = shape.weight_bits / 8
    layer_bytes = shape.main_bytes / shape.layers
    main_s = device.step_s(layer_bytes, params=layer_bytes / item_bytes, rows=prompt_tokens)
    if machines.main_s is not None:
        main_s = max(main_s, machines.main_s)
    active = max(1, round(active_experts(shape, prompt_tokens)))
    rows = prompt_tokens * shape.top_k / active
    expert_s = device.step_s(shape.expert_bytes, params=shape.expert_bytes / item_bytes, rows=rows)
    if machines.expert_s is not None:
        expert_s = max(expert_s, machines.expert_s)
    rounds = ceil(active / len(nodes))
    load_s = shape.expert_bytes / (min(node.link_gb_per_s for node in nodes) * 1e9)
    there = prompt_tokens * min(shape.top_k, len(nodes))
    back = prompt_tokens * shape.top_k
    talk_s = network.wire_s((there + back) * shape.row_bytes) + 2 * network.latency_s
    if not overlap:
        return shape.layers * (main_s + talk_s + rounds * (load_s + expert_s))
    if min(node.slots for node in nodes) == 1:
        # The one slot is loaded while the main node routes and sends, but not while it is computed with.
        return load_s + shape.layers * (max(load_s, main_s + talk_s) + expert_s + (rounds - 1) * (load_s + expert_s))
    return load_s + shape.layers * max(rounds * load_s, main_s + talk_s + rounds * expert_s)
