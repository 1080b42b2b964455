"""From marks to steps, layers and nodes: late and refused computes, and steps that broke off."""

from collections.abc import Sequence

from odmoe_server.cluster.events import LayerCall
from odmoe_server.cluster.timeline import Called, Heard, Mark, Stepped, Told
from odmoe_server.tracing.telling import StepWork, Telling
from odmoe_wire.messages import Compute, ComputeFailed, ExpertTiming, Result, Span

SPAN = Span(1, 7, 1)


def told(request_id: int, node: str, at_s: float, *experts: int, layer: int = 0) -> Told:
    compute = Compute(
        request_id=request_id, spans=[SPAN], layer=layer, experts=list(experts), counts=[1] * len(experts), ttl_s=1.0
    )
    return Told(at_s, node, compute)


def answered(request_id: int, node: str, at_s: float, *experts: int, layer: int = 0) -> Heard:
    timings = [ExpertTiming(expert=expert, outcome="hit", wait_s=0.0, compute_s=0.1) for expert in experts]
    return Heard(at_s, node, Result(request_id=request_id, layer=layer, timings=timings))


def called(began_s: float, ended_s: float, *experts: int, layer: int = 0) -> Called:
    call = LayerCall(call_id=1, spans=(SPAN,), layer=layer, counts=dict.fromkeys(experts, 1))
    return Called(began_s, ended_s, call, frozenset(), (), False)


def steps(marks: Sequence[Mark]) -> list[StepWork]:
    telling = Telling()
    return [step for mark in marks if (step := telling.heard(mark)) is not None]


def test_who_was_first_and_who_was_not() -> None:
    (step,) = steps(
        [
            told(1, "slow", 1.0, 3),
            told(2, "quick", 2.0, 3),
            answered(2, "quick", 2.5, 3),
            called(0.9, 2.6, 3),
            answered(1, "slow", 2.7, 3),
            Stepped(0.5, 3.0, (SPAN,), False),
        ]
    )
    nodes = [(node.node_id, node.began_s, node.ended_s, node.failed) for node in step.layers[0].nodes]
    assert nodes == [("quick", 2.0, 2.5, None), ("slow", 1.0, 2.6, "another node was first")]


def test_a_node_that_could_not() -> None:
    failed = Heard(1.5, "a", ComputeFailed(request_id=1, code="load_failed", reason="no such file"))
    (step,) = steps([told(1, "a", 1.0, 3), failed, called(0.9, 2.0, 3), Stepped(0.5, 3.0, (SPAN,), False)])
    assert [node.failed for node in step.layers[0].nodes] == ["load_failed"]


def test_layers_of_a_step_that_broke_off_are_not_the_next_ones() -> None:
    (step,) = steps(
        [called(0.1, 0.2, 3), called(1.1, 1.2, 4), called(1.3, 1.4, 5, layer=1), Stepped(1.0, 2.0, (SPAN,), False)]
    )
    assert [layer.experts for layer in step.layers] == [(4,), (5,)]


def test_what_a_step_took_of_each_sequence() -> None:
    spans = (SPAN, Span(1, 8, 1), Span(2, 40, 1))
    (step,) = steps([Stepped(1.0, 2.0, spans, False)])
    assert step.sequences == {1: (7, 2), 2: (40, 1)}


def test_an_answer_from_another_node_than_was_asked_counts_for_nothing() -> None:
    (step,) = steps(
        [told(1, "a", 1.0, 3), answered(1, "b", 1.2, 3), called(0.9, 2.0, 3), Stepped(0.5, 3.0, (SPAN,), False)]
    )
    assert [(node.node_id, node.failed) for node in step.layers[0].nodes] == [("a", "another node was first")]
