"""The node's core under random events: what must hold whatever comes in which order."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from odmoe_node.events import Answer, BreakOff, Forget, Mention, ServerLost, StartLoad, Tick
from odmoe_node.slots import Computing, Free, Loading, Resting, Riding
from odmoe_wire.messages import ComputeFailed, Result, SlotMode, Span
from support.node_rig import NodeRig

SEQUENCES = st.integers(1, 3)
POSITIONS = st.integers(0, 4)
LAYERS = st.integers(0, 3)
EXPERTS = st.lists(st.integers(0, 4), min_size=1, max_size=4, unique=True)
MODES: st.SearchStrategy[SlotMode] = st.sampled_from(["on-demand", "lru"])
SPANS = st.lists(st.builds(Span, SEQUENCES, POSITIONS, st.integers(1, 3)), min_size=1, max_size=2)

STEPS = st.one_of(
    st.tuples(st.just("forecast"), SEQUENCES, POSITIONS, LAYERS, EXPERTS),
    st.tuples(st.just("load"), SPANS, LAYERS, EXPERTS),
    st.tuples(st.just("compute"), SPANS, LAYERS, EXPERTS, st.sampled_from([0.005, 50.0])),
    st.tuples(st.just("release"), SEQUENCES, POSITIONS, LAYERS),
    st.tuples(st.just("roll_back"), SEQUENCES, POSITIONS),
    st.tuples(st.just("mode"), st.sampled_from(["on-demand", "lru"])),
    st.tuples(st.sampled_from(["end_load", "end_load", "stop_load", "end_compute", "end_compute"])),
    st.tuples(st.sampled_from(["break_load", "break_compute", "lost", "later", "much_later", "repeat"])),
    st.tuples(st.just("cancel"), SEQUENCES),
)


class Run:
    """A rig, and the computes it was given."""

    def __init__(
        self, num_slots: int, max_loading: int, mode: SlotMode = "on-demand", *, on_arrival: bool = False
    ) -> None:
        self.rig = NodeRig(num_slots=num_slots, max_loading=max_loading, on_arrival=on_arrival)
        self.asked: list[int] = []
        self.mode: SlotMode = mode
        self.causes = 0  # experts and events for which a load may have been broken off
        self.rig.view(epoch=1, mode=mode)

    def step(self, step: tuple) -> None:  # type: ignore[type-arg]
        rig = self.rig
        match step:
            case ("forecast", sequence, position, layer, experts):
                self.causes += len(experts)
                rig.forecast(layer, experts, sequence=sequence, position=position)
            case ("load", spans, layer, experts):
                self.causes += len(experts)
                rig.load(layer, experts, span=spans[0])
            case ("compute", spans, layer, experts, ttl_s):
                self.causes += len(experts)
                self.asked.append(rig.compute(layer, experts, spans=spans, ttl_s=ttl_s))
            case ("release", sequence, position, layer):
                rig.release(layer, position=position, sequence=sequence)
            case ("cancel", sequence):
                rig.cancel(sequence)
            case ("roll_back", sequence, position):
                rig.roll_back(position, sequence=sequence)
            case ("mode", mode):
                self.mode = mode
                rig.view(epoch=1, mode=mode)
            case _:
                self.mishap(step[0])
        self.check()

    def mishap(self, what: str) -> None:
        rig = self.rig
        match what:
            case "lost":
                rig.event(ServerLost())
                rig.join(epoch=1)
                self.mode = "on-demand"
            case "later" | "much_later":
                rig.now += 0.004 if what == "later" else 0.45
                rig.event(Tick())
            case "repeat" if self.asked:
                # Ids of another server's time are anyone's; only those of this one are duplicates.
                if rig.state.in_hand(self.asked[-1]):
                    rig.compute(0, [0], request_id=self.asked[-1])
            case "end_load" if rig.loading:
                rig.end_load()
            case "stop_load" if rig.loading and rig.loading[0].slot in rig.stopping:
                rig.stop_load()
            case "break_load" if rig.loading:
                rig.break_load()
            case "end_compute" if rig.computing:
                rig.end_compute()
            case "break_compute" if rig.computing:
                rig.break_compute()

    def check(self) -> None:
        rig = self.rig
        slots = [rig.state.slot(number) for number in range(rig.num_slots)]
        assert rig.state.used_slots == sum(not isinstance(slot, Free) for slot in slots)
        assert rig.state.accounted_bytes == 1000 * rig.state.used_slots
        assert {order.slot for order in rig.computing} == {
            number for number, slot in enumerate(slots) if isinstance(slot, Computing | Riding)
        }
        assert {order.slot for order in rig.loading} == {
            number for number, slot in enumerate(slots) if isinstance(slot, Loading | Riding)
        }
        assert len(rig.loading) <= 2
        assert self.mode == "lru" or not any(isinstance(slot, Resting) for slot in slots)
        assert rig.state.counters.loads_broken_off <= self.causes
        ended = Counter(answer.request_id for answer in rig.answers)
        assert set(ended) <= set(self.asked)
        assert not ended or max(ended.values()) == 1, "a compute was answered twice"
        assert len(self.asked) == len(rig.answers) + rig.forgotten + rig.state.num_requests


@settings(max_examples=300, deadline=None)
@given(
    num_slots=st.integers(1, 4),
    max_loading=st.integers(1, 2),
    mode=MODES,
    on_arrival=st.booleans(),
    steps=st.lists(STEPS, max_size=60),
)
def test_whatever_comes_each_compute_ends_once_and_no_slot_is_held_after_the_end(
    num_slots: int,
    max_loading: int,
    mode: SlotMode,
    on_arrival: bool,
    steps: list[tuple],  # type: ignore[type-arg]
) -> None:
    run = Run(num_slots, max_loading, mode, on_arrival=on_arrival)
    for step in steps:
        run.step(step)
    run.rig.finish()
    run.check()
    assert run.rig.state.num_requests == 0, "a compute starved"
    for sequence in (1, 2, 3):
        run.rig.cancel(sequence)
    run.rig.finish()
    run.check()
    assert run.mode == "lru" or run.rig.held == set()
    run.rig.view(epoch=1, mode="on-demand")
    assert run.rig.held == set()
    assert run.rig.state.num_wants == 0
    assert run.rig.state.accounted_bytes == 0


@settings(max_examples=100, deadline=None)
@given(num_slots=st.integers(1, 3), mode=MODES, on_arrival=st.booleans(), steps=st.lists(STEPS, max_size=40))
def test_every_result_times_each_of_its_experts(
    num_slots: int,
    mode: SlotMode,
    on_arrival: bool,
    steps: list[tuple],  # type: ignore[type-arg]
) -> None:
    run = Run(num_slots, 1, mode, on_arrival=on_arrival)
    for step in steps:
        run.step(step)
    run.rig.finish()
    for answer in run.rig.answers:
        assert isinstance(answer, Result | ComputeFailed)
        if isinstance(answer, Result):
            assert answer.timings
            assert all(timing.wait_s >= 0 for timing in answer.timings)


@settings(max_examples=100, deadline=None)
@given(
    routings=st.lists(st.tuples(EXPERTS, EXPERTS), min_size=1, max_size=12),
    num_slots=st.integers(1, 3),
    mode=MODES,
    on_arrival=st.booleans(),
)
def test_a_forecast_never_changes_what_is_computed(
    routings: list[tuple[list[int], list[int]]], num_slots: int, mode: SlotMode, on_arrival: bool
) -> None:
    """Decode steps of four layers with forecasts right, wrong or late; every compute must give its result."""
    rig = NodeRig(num_slots=num_slots, on_arrival=on_arrival)
    rig.view(epoch=1, mode=mode)
    for number, (forecast, needed) in enumerate(routings):
        position, layer = divmod(number, 4)
        rig.forecast(layer, forecast, position=position)
        if rig.loading and number % 2:
            rig.end_load()
        rig.compute(layer, needed, position=position)
        rig.finish()
        assert set(rig.outcomes()) == set(needed)
        assert mode == "lru" or rig.held == set(), "cacheless: nothing stays when nothing further is forecast"


@settings(max_examples=200, deadline=None)
@given(num_slots=st.integers(1, 3), mode=MODES, on_arrival=st.booleans(), steps=st.lists(STEPS, max_size=40))
def test_a_forecast_that_gave_way_to_a_need_is_in_its_slot_in_the_end(
    num_slots: int,
    mode: SlotMode,
    on_arrival: bool,
    steps: list[tuple],  # type: ignore[type-arg]
) -> None:
    """Whatever came before."""
    run = Run(num_slots, 1, mode, on_arrival=on_arrival)
    for step in steps:
        run.step(step)
    run.rig.finish()
    for sequence in (1, 2, 3):
        run.rig.cancel(sequence)
    run.rig.forecast(2, [7], sequence=9)
    run.rig.compute(1, [5], spans=[Span(9, 0, 1)])
    run.rig.finish()
    assert run.rig.outcomes().keys() == {5}
    assert (2, 7) in run.rig.held
    run.rig.compute(2, [7], spans=[Span(9, 0, 1)])
    run.rig.finish()
    assert run.rig.outcomes() == {7: "hit"}


@settings(max_examples=100, deadline=None)
@given(num_slots=st.integers(1, 3), mode=MODES, on_arrival=st.booleans(), steps=st.lists(STEPS, max_size=50))
def test_a_load_is_never_begun_and_broken_off_at_once(
    num_slots: int,
    mode: SlotMode,
    on_arrival: bool,
    steps: list[tuple],  # type: ignore[type-arg]
) -> None:
    """What starts was chosen knowing all. (That no unwanted load runs while something waits, the integrity check of
    every event asserts.)"""
    run = Run(num_slots, 1, mode, on_arrival=on_arrival)
    for step in steps:
        run.step(step)
        assert not {StartLoad, BreakOff} <= {type(action) for action in run.rig.actions}


@settings(max_examples=200, deadline=None)
@given(
    num_slots=st.integers(1, 3),
    max_loading=st.integers(1, 2),
    mode=MODES,
    on_arrival=st.booleans(),
    steps=st.lists(STEPS, max_size=50),
)
def test_a_load_whose_end_is_not_awaited_lets_nothing_begin(
    num_slots: int,
    max_loading: int,
    mode: SlotMode,
    on_arrival: bool,
    steps: list[tuple],  # type: ignore[type-arg]
) -> None:
    """So a driver need not wake for it. Whenever the state says so, the load ends at once."""
    run = Run(num_slots, max_loading, mode, on_arrival=on_arrival)
    for step in steps:
        run.step(step)
        if run.rig.loading and not run.rig.state.awaits_load:
            run.rig.end_load()
            # A compute whose time is over at this very event is answered by that.
            begun = {type(action) for action in run.rig.actions} - {Mention}
            assert begun <= ({Answer, Forget} if run.rig.state.counters.expired else set())
            run.check()


@settings(max_examples=100, deadline=None)
@given(num_slots=st.integers(1, 3), on_arrival=st.booleans(), steps=st.lists(STEPS, max_size=50))
def test_while_a_brief_compute_is_done_on_the_spot_nothing_could_begin(
    num_slots: int,
    on_arrival: bool,
    steps: list[tuple],  # type: ignore[type-arg]
) -> None:
    run = Run(num_slots, 1, on_arrival=on_arrival)
    for step in steps:
        run.step(step)
        if any(run.rig.state.is_brief(order) for order in run.rig.computing):
            assert not run.rig.loading
            assert run.rig.held == {order.key for order in run.rig.computing}
