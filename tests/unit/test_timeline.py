"""The timeline's core: marks in, slices out; and the file they go to. No thread, no clock but the marks' own."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from odmoe_server.cluster.chrome_trace import Drawing
from odmoe_server.cluster.events import LayerCall
from odmoe_server.cluster.timeline import MAX_OPEN, Called, Heard, Mark, Rendering, Taken, Timeline, Told
from odmoe_server.cluster.timeline_file import TimelineFile, record_timeline
from odmoe_wire.messages import (
    Align,
    Compute,
    ComputeFailed,
    ExpertTiming,
    Heartbeat,
    Loaded,
    LoadFailed,
    Result,
    Schedule,
    Span,
)
from support.drawn import Slice, read, slices_of

SPAN = Span(1, 40)


def drawn(*marks: Mark, num_layers: int = 2) -> list[Slice]:
    return slices_of(events_of(Rendering(num_layers=num_layers, drawing=Drawing(origin_s=0.0)), *marks))


def events_of(rendering: Rendering, *marks: Mark) -> list[dict[str, Any]]:
    return [event for mark in marks for event in rendering.events(mark)]


def told(at_s: float, request_id: int = 1, *, peer_id: str = "a", layer: int = 0) -> Told:
    compute = Compute(request_id=request_id, spans=[SPAN], layer=layer, experts=[3, 5], counts=[1, 1], ttl_s=60.0)
    return Told(at_s, peer_id, compute)


def result(at_s: float, *timings: ExpertTiming, request_id: int = 1, peer_id: str = "a") -> Heard:
    return Heard(at_s, peer_id, Result(request_id=request_id, layer=0, timings=list(timings)))


def loaded(at_s: float, expert: int, load_s: float, *, ago_s: float = 0.0) -> Heard:
    message = Loaded(layer=0, expert=expert, load_s=load_s, load_bytes=100, on_demand=False, ago_s=ago_s)
    return Heard(at_s, "a", message)


def called(
    began_s: float, ended_s: float, layer: int, *, span: Span = SPAN, is_prompt: bool = False, outcome: str = "hit"
) -> Called:
    call = LayerCall(call_id=1, spans=(span,), layer=layer, counts={3: 1})
    timings = (ExpertTiming(3, outcome, 0.0, 0.001),)  # type: ignore[arg-type]
    return Called(began_s, ended_s, call, frozenset({3}), timings, is_prompt)


def forecast(at_s: float, layer: int, *, position: int = 40) -> Heard:
    return Heard(at_s, "predictor", Schedule(span=Span(1, position), layer=layer, experts=[3, 4]))


def on(slices: list[Slice], process: str, row: str) -> list[tuple[str, float, float]]:
    """(name, began, ended) in milliseconds."""
    rounded = [(s.name, round(s.began / 1e3, 3), round(s.ended / 1e3, 3)) for s in slices if s.process == process]
    return [
        shape for shape, s in zip(rounded, [s for s in slices if s.process == process], strict=True) if s.row == row
    ]


# -------------------------------------------------------------------------------------------------------- nodes


def test_a_result_is_drawn_backwards_from_its_arrival() -> None:
    slices = drawn(told(1.0), result(1.1, ExpertTiming(3, "hit", 0.0, 0.02), ExpertTiming(5, "late", 0.05, 0.03)))
    assert on(slices, "node a", "send") == [("L0", 1000, 1020)]
    assert on(slices, "node a", "compute") == [("L0 E3", 1020, 1040), ("L0 E5", 1070, 1100)]
    assert on(slices, "node a", "wait") == [("L0 E5", 1040, 1070)]


def test_durations_that_do_not_fit_between_request_and_result() -> None:
    """A node whose clock runs wild must not draw before the request, nor after the result."""
    slices = drawn(told(1.0), result(1.1, ExpertTiming(3, "late", 0.5, 0.5)))
    assert all(1000 <= s.began / 1e3 <= s.ended / 1e3 <= 1100 for s in slices)


def test_a_load_is_drawn_backwards_from_its_arrival() -> None:
    slices = drawn(loaded(2.0, 3, 0.25), loaded(2.125, 4, 0.25))
    assert on(slices, "node a", "load") == [("L0 E3", 1750, 2000), ("L0 E4", 2000, 2125)]
    assert [s.args.get("cut_ms") for s in slices] == [None, 125.0], "what was cut says so"


def test_a_load_told_of_behind_its_answer_is_drawn_where_it_was() -> None:
    hit = ExpertTiming(3, "hit", 0.0, 0.02)
    slices = drawn(told(1.0), result(1.1, hit), loaded(1.1, 3, 0.25, ago_s=0.5))
    assert on(slices, "node a", "load") == [("L0 E3", 350, 600)]
    assert on(slices, "node a", "compute")[0][1] > 600


def test_results_nobody_waits_for_are_not_drawn() -> None:
    timing = ExpertTiming(3, "hit", 0.0, 0.02)
    answered = result(1.1, timing)
    assert drawn(answered) == []
    assert drawn(told(1.0), result(1.1, timing, peer_id="b")) == [], "it was asked of another node"
    once = drawn(told(1.0), answered)
    assert drawn(told(1.0), answered, answered) == once


def test_failures_are_marked_where_they_happened() -> None:
    rendering = Rendering(num_layers=2, drawing=Drawing(origin_s=0.0))
    failed = ComputeFailed(request_id=1, code="load_failed", reason="x")
    events = events_of(
        rendering,
        told(1.0),
        Heard(1.1, "a", LoadFailed(layer=0, expert=3, reason="x")),
        Heard(1.2, "a", failed),
        result(1.3, ExpertTiming(3, "hit", 0.0, 0.1)),
    )
    assert slices_of(events) == [], "the request is over"
    assert [(e["name"], e["ts"]) for e in events if e["ph"] == "i"] == [
        ("failed: L0 E3", 1_100_000.0),
        ("failed: load_failed", 1_200_000.0),
    ]


def test_requests_that_are_never_answered_are_forgotten() -> None:
    rendering = Rendering(num_layers=2, drawing=Drawing(origin_s=0.0))
    for number in range(MAX_OPEN + 10):
        rendering.events(told(1.0, number))
    timing = ExpertTiming(3, "hit", 0.0, 0.01)
    assert not rendering.events(result(2.0, timing, request_id=9))
    assert rendering.events(result(2.0, timing, request_id=10))


# --------------------------------------------------------------------------------------------- predictor, server


def test_a_row_for_each_shadow_layer() -> None:
    align = Align(sequence=1, position=41, tokens=[7], cache=[])
    marks = [forecast(1.0, 0), forecast(1.1, 1), Told(1.5, "predictor", align)]
    slices = drawn(*marks, forecast(1.6, 0, position=41), forecast(1.8, 1, position=41))
    assert on(slices, "predictor", "layer 0") == [("shadow L0", 1000, 1000), ("shadow L0", 1500, 1600)]
    assert on(slices, "predictor", "layer 1") == [("shadow L1", 1000, 1100), ("shadow L1", 1600, 1800)]


def test_a_row_for_each_server_layer_and_one_for_the_steps() -> None:
    later = Span(1, 41)
    slices = drawn(
        forecast(0.875, 1),
        called(1.0, 1.25, 0),
        called(1.5, 1.75, 1),
        called(2.0, 2.25, 0, span=later),
        called(2.25, 2.5, 1, span=later),
    )
    first = [("experts L0", 1000, 1250), ("own work L0", 1750, 2000), ("experts L0", 2000, 2250)]
    assert on(slices, "server", "layer 0") == first
    second = [("own work L1", 1250, 1500), ("experts L1", 1500, 1750), ("experts L1", 2250, 2500)]
    assert on(slices, "server", "layer 1") == second
    assert on(slices, "server", "step") == [("token 40", 1000, 1750), ("token 41", 1750, 2500)]
    lead = [s.args.get("forecast_lead_ms") for s in slices if s.name.startswith("experts")]
    assert lead == [None, 625.0, None, None]


def test_the_pause_between_two_answers_is_nobodys_work() -> None:
    other = Span(2, 0, 5)
    slices = drawn(called(1.0, 1.5, 0), called(1.5, 2.0, 1), called(9.0, 9.5, 0, span=other, is_prompt=True))
    assert on(slices, "server", "layer 0") == [("experts L0", 1000, 1500), ("experts L0", 9000, 9500)]


def test_the_totals_leave_prompts_out() -> None:
    rendering = Rendering(num_layers=1, drawing=Drawing(origin_s=0.0))
    late = result(2.4, ExpertTiming(3, "late", 0.25, 0.1), request_id=2)
    prompt = Span(1, 0, 40)
    events_of(
        rendering,
        told(1.0),
        result(1.5, ExpertTiming(3, "miss", 0.25, 0.1)),
        called(1.0, 1.5, 0, span=prompt, is_prompt=True),
        told(2.0, 2),
        late,
        called(2.0, 2.5, 0, outcome="late"),
        Taken(2.6, num_tokens=1, num_guesses=0),
    )
    assert rendering.totals.summary() == {
        "tokens": 1,
        "guesses": 0,
        "guesses_agreed": 0,
        "time_ms": 1000.0,
        "waiting_for_experts_ms": 500.0,
        "stalled_on_loads_ms": 250.0,
        "experts_hit": 0,
        "experts_late": 1,
        "experts_miss": 0,
    }


def test_guesses_that_were_wrong_are_no_tokens() -> None:
    """A step of four spans, of which the model agreed with one guess; then a step in which it agreed with both."""
    rendering = Rendering(num_layers=1, drawing=Drawing(origin_s=0.0))
    events_of(rendering, Taken(1.0, num_tokens=2, num_guesses=3), Taken(2.0, num_tokens=3, num_guesses=2))
    summary = rendering.totals.summary()
    assert (summary["tokens"], summary["guesses"], summary["guesses_agreed"]) == (5, 5, 3)


def test_what_is_no_part_of_the_drawing() -> None:
    assert drawn(Heard(1.0, "a", Heartbeat(count=1)), Told(1.0, "a", Heartbeat(count=1))) == []


def test_marks_are_stamped_as_they_come() -> None:
    marks: list[Mark] = []
    times = iter([1.0, 2.0, 3.0])
    timeline = Timeline(marks.append, lambda: next(times))
    timeline.heard("a", Heartbeat(count=1))
    timeline.told("b", Heartbeat(count=2))
    call = LayerCall(call_id=1, spans=(SPAN,), layer=0, counts={3: 1})
    timeline.called(0.5, call=call, predicted=frozenset(), timings=[], is_prompt=False)
    assert marks == [
        Heard(1.0, "a", Heartbeat(count=1)),
        Told(2.0, "b", Heartbeat(count=2)),
        Called(0.5, 3.0, call, frozenset(), (), False),
    ]


# ---------------------------------------------------------------------------------------------------------- file


@contextmanager
def timeline_file(path: Path, *, cap_bytes: int = 1 << 20) -> Iterator[TimelineFile]:
    rendering = Rendering(num_layers=2, drawing=Drawing(origin_s=0.0))
    file = TimelineFile(path, rendering=rendering, facts={"model_type": "mixtral"}, cap_bytes=cap_bytes)
    with closing(file):
        yield file


def test_the_file_is_whole_after_every_write(tmp_path: Path) -> None:
    path = tmp_path / "timeline.json"
    with timeline_file(path) as file:
        assert slices_of(read(path)["traceEvents"]) == []
        for count in range(1, 4):
            file.write([called(count, count + 0.5, 0)], 0)
            assert len([s for s in slices_of(read(path)["traceEvents"]) if s.name == "experts L0"]) == count


def test_the_file_tells_how_it_came_about(tmp_path: Path) -> None:
    path = tmp_path / "timeline.json"
    with timeline_file(path) as file:
        file.write([told(1.0), result(1.1, ExpertTiming(3, "hit", 0.0, 0.09))], 7)
    about = read(path)["otherData"]
    assert about["model_type"] == "mixtral"
    assert about["marks_dropped"] == 7
    assert about["ways_ms"] == {"a": {"requests": 1, "shortest": 10.0, "mean": 10.0}}
    assert "clocks of two machines are never compared" in " ".join(about["how"])
    assert about["precision"]
    assert "1048576 bytes" in about["cap"]


def test_a_full_file_makes_room_and_both_halves_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "timeline.json"
    numbers = range(1, 100)
    with timeline_file(path, cap_bytes=8000) as file:
        for number in numbers:
            file.write([called(number, number + 0.5, 0)], 0)
    parts = [tmp_path / "timeline.json.1", path]
    assert all(part.stat().st_size <= 8000 for part in parts)
    began = [s.began for part in parts for s in slices_of(read(part)["traceEvents"]) if s.name == "experts L0"]
    assert began == [number * 1e6 for number in numbers][-len(began) :], "the newest, without a gap"
    assert len(list(tmp_path.iterdir())) == 2


def test_the_file_of_the_run_before_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "timeline.json"
    path.write_text("of before")
    with timeline_file(path):
        assert slices_of(read(path)["traceEvents"]) == []
    assert (tmp_path / "timeline.json.1").read_text() == "of before"


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be written"):
        record_timeline(tmp_path / "missing" / "timeline.json", num_layers=1, facts={}, clock=lambda: 0.0)
