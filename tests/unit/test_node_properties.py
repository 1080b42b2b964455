"""The node's core under random events: what must hold whatever comes in which order."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from odmoe_node.events import ComputeBroke, ServerLost, Tick
from odmoe_node.slots import Computing, Free
from odmoe_wire.messages import ComputeFailed, Result, Span
from support.node_rig import NodeRig

SEQUENCES = st.integers(1, 3)
POSITIONS = st.integers(0, 4)
LAYERS = st.integers(0, 3)
EXPERTS = st.lists(st.integers(0, 4), min_size=1, max_size=4, unique=True)
SPANS = st.lists(st.builds(Span, SEQUENCES, POSITIONS, st.integers(1, 3)), min_size=1, max_size=2)

STEPS = st.one_of(
    st.tuples(st.just("forecast"), SEQUENCES, POSITIONS, LAYERS, EXPERTS),
    st.tuples(st.just("load"), SPANS, LAYERS, EXPERTS),
    st.tuples(st.just("compute"), SPANS, LAYERS, EXPERTS, st.sampled_from([0.005, 50.0])),
    st.tuples(st.just("release"), SEQUENCES, POSITIONS, LAYERS),
    st.tuples(st.sampled_from(["end_load", "end_load", "end_compute", "end_compute"])),
    st.tuples(st.sampled_from(["break_load", "break_compute", "lost", "later", "repeat"])),
    st.tuples(st.just("cancel"), SEQUENCES),
)


class Run:
    """A rig, and the computes it was given."""

    def __init__(self, num_slots: int, max_loading: int) -> None:
        self.rig = NodeRig(num_slots=num_slots, max_loading=max_loading)
        self.asked: list[int] = []

    def step(self, step: tuple) -> None:  # type: ignore[type-arg]
        rig = self.rig
        match step:
            case ("forecast", sequence, position, layer, experts):
                rig.forecast(layer, experts, sequence=sequence, position=position)
            case ("load", spans, layer, experts):
                rig.load(layer, experts, span=spans[0])
            case ("compute", spans, layer, experts, ttl_s):
                self.asked.append(rig.compute(layer, experts, spans=spans, ttl_s=ttl_s))
            case ("release", sequence, position, layer):
                rig.release(layer, position=position, sequence=sequence)
            case ("cancel", sequence):
                rig.cancel(sequence)
            case _:
                self.mishap(step[0])
        self.check()

    def mishap(self, what: str) -> None:
        rig = self.rig
        match what:
            case "lost":
                rig.event(ServerLost())
                rig.join(epoch=1)
            case "later":
                rig.now += 0.004
                rig.event(Tick())
            case "repeat" if self.asked:
                # Ids of another server's time are anyone's; only those of this one are duplicates.
                if rig.state.in_hand(self.asked[-1]):
                    rig.compute(0, [0], request_id=self.asked[-1])
            case "end_load" if rig.loading:
                rig.end_load()
            case "break_load" if rig.loading:
                rig.break_load()
            case "end_compute" if rig.computing:
                rig.end_compute()
            case "break_compute" if rig.computing:
                rig.event(ComputeBroke(rig.computing.pop(0).slot, "broken"))

    def check(self) -> None:
        rig = self.rig
        slots = [rig.state.slot(number) for number in range(rig.num_slots)]
        assert rig.state.used_slots == sum(not isinstance(slot, Free) for slot in slots)
        assert rig.state.accounted_bytes == 1000 * rig.state.used_slots
        assert {order.slot for order in rig.computing} == {
            number for number, slot in enumerate(slots) if isinstance(slot, Computing)
        }
        assert len(rig.loading) <= 2
        ended = Counter(answer.request_id for answer in rig.answers)
        assert set(ended) <= set(self.asked)
        assert not ended or max(ended.values()) == 1, "a compute was answered twice"
        assert len(self.asked) == len(rig.answers) + rig.forgotten + rig.state.num_requests


@settings(max_examples=300, deadline=None)
@given(num_slots=st.integers(1, 4), max_loading=st.integers(1, 2), steps=st.lists(STEPS, max_size=60))
def test_whatever_comes_each_compute_ends_once_and_no_slot_is_held_after_the_end(
    num_slots: int,
    max_loading: int,
    steps: list[tuple],  # type: ignore[type-arg]
) -> None:
    run = Run(num_slots, max_loading)
    for step in steps:
        run.step(step)
    run.rig.finish()
    run.check()
    assert run.rig.state.num_requests == 0, "a compute starved"
    for sequence in (1, 2, 3):
        run.rig.cancel(sequence)
    run.rig.finish()
    assert run.rig.held == set()
    assert run.rig.state.num_wants == 0
    assert run.rig.state.accounted_bytes == 0


@settings(max_examples=100, deadline=None)
@given(num_slots=st.integers(1, 3), steps=st.lists(STEPS, max_size=40))
def test_every_result_times_each_of_its_experts(num_slots: int, steps: list[tuple]) -> None:  # type: ignore[type-arg]
    run = Run(num_slots, 1)
    for step in steps:
        run.step(step)
    run.rig.finish()
    for answer in run.rig.answers:
        assert isinstance(answer, Result | ComputeFailed)
        if isinstance(answer, Result):
            assert answer.timings
            assert all(timing.wait_s >= 0 for timing in answer.timings)


@settings(max_examples=100, deadline=None)
@given(routings=st.lists(st.tuples(EXPERTS, EXPERTS), min_size=1, max_size=12), num_slots=st.integers(1, 3))
def test_a_forecast_never_changes_what_is_computed(routings: list[tuple[list[int], list[int]]], num_slots: int) -> None:
    """Decode steps of four layers with forecasts right, wrong or late; every compute must give its result."""
    rig = NodeRig(num_slots=num_slots)
    for number, (forecast, needed) in enumerate(routings):
        position, layer = divmod(number, 4)
        rig.forecast(layer, forecast, position=position)
        if rig.loading and number % 2:
            rig.end_load()
        rig.compute(layer, needed, position=position)
        rig.finish()
        assert set(rig.outcomes()) == set(needed)
        assert rig.held == set(), "cacheless: nothing stays when nothing further is forecast"
