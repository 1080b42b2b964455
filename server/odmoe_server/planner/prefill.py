"""Time to the first token: a prompt goes through all layers, whose experts are spread over all nodes.

No forecasts are involved. Routing is taken to be even over the experts of a layer. In phases, as the paper's times show
it, a layer is routed, sent, loaded, computed and brought back one after the other. With loads ahead, as odmoe does it,
each node loads its next expert as soon as it has a slot, from the moment the layer before was routed.
"""

from collections import Counter
from dataclasses import replace

from odmoe_server.planner.machines import Crew, Machines, Times, members, times
from odmoe_server.planner.rig import Job, Rig
from odmoe_server.planner.shape import Shape
from odmoe_wire import placement


def active_experts(shape: Shape, prompt_tokens: int) -> float:
    """How many of a layer's experts a prompt is expected to need when every expert is as likely as any other."""
    return float(shape.num_experts * (1 - (1 - shape.top_k / shape.num_experts) ** prompt_tokens))


def prefill_s(
    shape: Shape, machines: Machines, *, prompt_tokens: int, overlap: bool, chunk_tokens: int | None = None
) -> float:
    """Seconds from the prompt to the first token, with or without loads ahead. A prompt goes through the layers in
    chunks of so many tokens, or all at once."""
    chunks = chunks_of(prompt_tokens, chunk_tokens)
    if not overlap:
        return sum(_phases_s(shape, machines, prompt_tokens=tokens) for tokens in chunks)
    rig, known_s = Rig(machines, times(shape, machines).load_s), 0.0
    for tokens in chunks:
        active = max(1, round(active_experts(shape, tokens)))
        prompt = prompt_times(shape, machines, prompt_tokens=tokens, active=active)
        known_s = pass_through(rig, prompt, machines, layers=shape.layers, active=active, known_s=known_s)
    return rig.clock_s


def shadow_s(shape: Shape, machines: Machines, *, prompt_tokens: int) -> float:
    """Seconds a shadow takes to go through a prompt itself."""
    item_bytes = shape.weight_bits / 8
    narrower = min(1.0, machines.shadow_bits / shape.weight_bits)
    layer_bytes = shape.main_bytes / shape.layers
    read_bytes = layer_bytes + active_experts(shape, prompt_tokens) * shape.expert_bytes
    used_params = (layer_bytes + shape.top_k * shape.expert_bytes) / item_bytes
    layer_s = machines.device.step_s(read_bytes * narrower, params=used_params, rows=prompt_tokens)
    return shape.layers * max(layer_s, machines.shadow_s or 0.0)


def chunks_of(prompt_tokens: int, chunk_tokens: int | None) -> list[int]:
    """A prompt's length, cut."""
    size = chunk_tokens or prompt_tokens
    return [min(size, prompt_tokens - begun) for begun in range(0, prompt_tokens, size)]


def prompt_times(shape: Shape, machines: Machines, *, prompt_tokens: int, active: int) -> Times:
    """The seconds of each step when so many tokens go through a layer, of whose experts so many are active. The rows
    that go to one node are one message."""
    device, network = machines.device, machines.network
    item_bytes = shape.weight_bits / 8
    layer_bytes = shape.main_bytes / shape.layers
    main_s = device.step_s(layer_bytes, params=layer_bytes / item_bytes, rows=prompt_tokens)
    rows = prompt_tokens * shape.top_k / active
    expert_s = device.step_s(shape.expert_bytes, params=shape.expert_bytes / item_bytes, rows=rows)
    there = prompt_tokens * min(shape.top_k, len(machines.nodes))
    talking = min(active, len(machines.nodes))
    return replace(
        times(shape, machines),
        main_s=max(main_s, machines.main_s or 0.0),
        expert_s=max(expert_s, machines.expert_s or 0.0),
        row_s=network.overhead_s + network.wire_s(there * shape.row_bytes / talking),
    )


def pass_through(rig: Rig, prompt: Times, crew: Crew, *, layers: int, active: int, known_s: float = 0.0) -> float:
    """Take a prompt, or the next chunk of it, through all layers of the rig. The first layer's loads may begin at
    `known_s`; returns when those of a next chunk may."""
    nodes = members(crew)
    for _ in range(layers):
        dealt: dict[int, list[Job]] = {}
        for node in placement.deal_prompt(range(active), nodes).values():
            job = Job(known_s)
            dealt.setdefault(int(node), []).append(job)
            rig.announce(int(node), job)
        known_s = rig.clock_s + prompt.main_s
        rig.layer(dealt, prompt)
    return known_s


def _phases_s(shape: Shape, machines: Machines, *, prompt_tokens: int) -> float:
    """One phase after the other, each as long as its slowest node."""
    network, nodes = machines.network, machines.nodes
    active = max(1, round(active_experts(shape, prompt_tokens)))
    prompt = prompt_times(shape, machines, prompt_tokens=prompt_tokens, active=active)
    there = prompt_tokens * min(shape.top_k, len(nodes))
    back = prompt_tokens * shape.top_k
    talk_s = network.wire_s((there + back) * shape.row_bytes) + 2 * network.latency_s
    talk_s += 2 * min(active, len(nodes)) * network.overhead_s
    dealt = Counter(int(node) for node in placement.deal_prompt(range(active), members(machines)).values())
    loaded_s = max(count * prompt.load_s[node] for node, count in dealt.items())
    # A core that all share computes what is on several nodes one after the other.
    computed_s = (active if machines.shared_core else max(dealt.values())) * prompt.expert_s
    return shape.layers * (prompt.main_s + talk_s + loaded_s + computed_s)
