"""How many nodes, and how fast a link, for so many tokens/s. Asks the model again and again; knows no table."""

from dataclasses import dataclass, replace
from typing import Final

from odmoe_server.planner.answer import Question, speed
from odmoe_server.planner.machines import times

FASTEST_LINK_GB_PER_S: Final = 1000.0
# A short run must come this near before a whole one is made.
_NEAR: Final = 0.97
_SHORT_TOKENS: Final = 32
_STEPS: Final = 12


@dataclass(frozen=True, kw_only=True)
class Found:
    """The least that reaches the speed, or None; `tokens_per_s` is what it reaches, or the most that was seen."""

    least: float | None
    tokens_per_s: float


def nodes_for(question: Question, tokens_per_s: float) -> Found:
    """The fewest nodes, group by group, with all else as it is. More groups than layers would stand idle."""
    size, layers = question.machines.group_size, question.shape.layers
    load_s = times(question.shape, question.machines).load_s[0]
    per_node = -(-question.shape.top_k // size)
    # A group's links have this much to load for each token, whatever else happens.
    first = min(layers, max(1, int(tokens_per_s * layers * per_node * load_s)))
    seen: dict[int, float] = {}
    for groups in range(first, layers + 1):
        seen[groups] = _reached(_with_nodes(question, groups * size), tokens_per_s)
        if seen[groups] >= tokens_per_s:
            return Found(least=groups * size, tokens_per_s=seen[groups])
    best = max(seen, key=lambda groups: seen[groups])
    return Found(least=None, tokens_per_s=speed(_with_nodes(question, best * size)))


def link_for(question: Question, tokens_per_s: float) -> Found:
    """The slowest link, in GB/s, with the nodes as they are."""
    low, high = 0.0, FASTEST_LINK_GB_PER_S
    reached = _reached(_with_link(question, high), tokens_per_s)
    if reached < tokens_per_s:
        return Found(least=None, tokens_per_s=speed(_with_link(question, high)))
    for _ in range(_STEPS):
        # The speed bends at small bandwidths, so halve by ratio once there is a lower end.
        middle = (low * high) ** 0.5 if low else high / 4
        now = _reached(_with_link(question, middle), tokens_per_s)
        low, high, reached = (low, middle, now) if now >= tokens_per_s else (middle, high, reached)
    return Found(least=high, tokens_per_s=reached)


def _reached(question: Question, tokens_per_s: float) -> float:
    short = speed(replace(question, output_tokens=min(_SHORT_TOKENS, question.output_tokens)))
    return speed(question) if short >= _NEAR * tokens_per_s else short


def _with_nodes(question: Question, nodes: int) -> Question:
    return replace(question, machines=replace(question.machines, nodes=(question.machines.nodes[0],) * nodes))


def _with_link(question: Question, link_gb_per_s: float) -> Question:
    node = replace(question.machines.nodes[0], link_gb_per_s=link_gb_per_s)
    return _with_nodes(
        replace(question, machines=replace(question.machines, nodes=(node,))), len(question.machines.nodes)
    )
