"""What the model predicts for one question: speed, first token, memory, and what bounds the speed."""

from dataclasses import dataclass, replace
from typing import Literal

from odmoe_server.planner import drafts, memory, prefill
from odmoe_server.planner.forecasts import Forecast
from odmoe_server.planner.machines import Machines, Times, members, times
from odmoe_server.planner.memory import Memory
from odmoe_server.planner.shape import Shape
from odmoe_server.planner.simulate import Decoded
from odmoe_wire import placement


@dataclass(frozen=True, kw_only=True)
class Question:
    """All that an answer depends on."""

    shape: Shape
    machines: Machines
    forecast: Forecast
    prompt_tokens: int
    output_tokens: int
    prefill_overlap: bool
    seed: int
    prefill_chunk: int | None = None
    prompt_kv: Literal["full", "own"] = "full"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """`if_free` says how many tokens/s there would be if one thing cost nothing; the first of them bounds the speed.
    `hidden_load_s` is the longest load that forecasts known in time hide behind the other groups' work."""

    times: Times
    num_groups: int
    decoded: Decoded
    first_token_s: float
    hidden_load_s: float | None
    memory: Memory
    if_free: tuple[tuple[str, float], ...]

    @property
    def bound(self) -> str:
        return self.if_free[0][0]


def answer(question: Question) -> Answer:
    """Predict everything for one question."""
    steps = times(question.shape, question.machines)
    return Answer(
        times=steps,
        num_groups=groups_of(question.machines),
        decoded=_decode(question, steps, question.forecast),
        first_token_s=first_token_s(question),
        hidden_load_s=hidden_load_s(question.shape, question.machines, steps),
        memory=memory.of(
            question.shape,
            question.machines,
            context_tokens=question.prompt_tokens + question.output_tokens,
            shadow=question.forecast.source == "shadow",
        ),
        if_free=_if_free(question, steps),
    )


def speed(question: Question) -> float:
    """Only the tokens/s of an answer."""
    return _decode(question, times(question.shape, question.machines), question.forecast).tokens_per_s


def first_token_s(question: Question) -> float:
    """Seconds from the prompt to the first token."""
    return prefill.prefill_s(
        question.shape,
        question.machines,
        prompt_tokens=question.prompt_tokens,
        overlap=question.prefill_overlap,
        chunk_tokens=question.prefill_chunk,
    )


def shadow_begins_s(question: Question, steps: Times) -> float:
    """How long after the first token the shadow has the prompt's keys and values: they are sent to it, or it has gone
    through the prompt itself meanwhile."""
    if question.prompt_kv == "full":
        return steps.latency_s + question.prompt_tokens * steps.kv_s
    own_s = prefill.shadow_s(question.shape, question.machines, prompt_tokens=question.prompt_tokens)
    return max(0.0, own_s - first_token_s(question))


def groups_of(machines: Machines) -> int:
    """How many groups the nodes form."""
    return len(placement.groups(members(machines), machines.group_size))


def hidden_load_s(shape: Shape, machines: Machines, steps: Times) -> float | None:
    """The longest load that is hidden when forecasts are right and in time; None where a node has several experts
    of a layer to load, or nodes are unlike.

    With one slot a node can load from the end of its expert to its next layer's rows: the time of all N_g groups'
    layers but for its own expert. With more slots it can load all the time. A core that all share computes a layer's
    experts, and has their results, one after the other."""
    num_groups = groups_of(machines)
    if len(machines.nodes) // num_groups < shape.top_k or len(set(machines.nodes)) > 1:
        return None
    in_turn = shape.top_k if machines.shared_core else 1
    there_s = steps.main_s + shape.top_k * steps.row_s + steps.latency_s
    back_s = steps.latency_s + in_turn * steps.row_s
    round_s = num_groups * (there_s + in_turn * steps.expert_s + back_s)
    return round_s if min(node.slots for node in machines.nodes) > 1 else round_s - steps.expert_s


def _if_free(question: Question, steps: Times) -> tuple[tuple[str, float], ...]:
    """Tokens/s with each thing for nothing, the most helpful first."""
    forecast = question.forecast
    never_waits = forecast if forecast.draft else replace(forecast, align_token=0, align_kv=0, run_ahead=0)
    perfect = replace(forecast, source="shadow", recall=(1.0,))
    cases = [
        ("loads", steps.without("loads"), forecast),
        ("network", steps.without("network"), forecast),
        ("compute of server and nodes", steps.without("compute"), forecast),
        ("wrong forecasts" if forecast.source == "shadow" else "having no shadow", steps, perfect),
    ]
    if forecast.source == "shadow":
        cases.append(("waiting for the shadow", steps.without("shadow"), never_waits))
    speeds = [(name, _decode(question, changed, guess).tokens_per_s) for name, changed, guess in cases]
    return tuple(sorted(speeds, key=lambda case: -case[1]))


def _decode(question: Question, steps: Times, forecast: Forecast) -> Decoded:
    return drafts.decode(
        question.machines,
        steps,
        replace(forecast, begins_s=shadow_begins_s(question, steps)),
        layers=question.shape.layers,
        num_experts=question.shape.num_experts,
        top_k=question.shape.top_k,
        tokens=question.output_tokens,
        seed=question.seed,
    )
