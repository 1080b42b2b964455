"""What happened when, as slices that a trace viewer draws. Pure: marks in, events of Chrome's trace format out.

Knows the wire's messages; knows no clock but in `Timeline`, which stamps, and no file. All stamps are the server's.
What other machines did is drawn backwards from the arrival of their message by the durations it carries, so clocks
of two machines are never compared, and whatever a node did appears late by the time its message took.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from odmoe_server.cluster.chrome_trace import Drawing, Event, milliseconds
from odmoe_server.cluster.events import LayerCall
from odmoe_wire.messages import (
    Align,
    AnyMessage,
    Compute,
    ComputeFailed,
    ExpertTiming,
    Loaded,
    LoadFailed,
    Result,
    Schedule,
    Span,
)

KeyT = TypeVar("KeyT")
ValueT = TypeVar("ValueT")

SERVER: Final = "server"
PREDICTOR: Final = "predictor"
MAX_OPEN: Final = 4096  # requests that may wait for their answer, and forecasts that are remembered


@dataclass(frozen=True, slots=True)
class Heard:
    """A peer's message came in."""

    at_s: float
    peer_id: str
    message: AnyMessage


@dataclass(frozen=True, slots=True)
class Told:
    """A message is about to go out to a peer."""

    at_s: float
    peer_id: str
    message: AnyMessage


@dataclass(frozen=True, slots=True)
class Called:
    """The decode loop had a layer's experts computed: the gate had spoken at `began_s`, all rows were there at
    `ended_s`. `predicted` are the experts that were forecast by then."""

    began_s: float
    ended_s: float
    call: LayerCall
    predicted: frozenset[int]
    timings: tuple[ExpertTiming, ...]
    is_prompt: bool


@dataclass(frozen=True, slots=True)
class Came:
    """A request for one answer was queued, in the `context` of whoever asked."""

    at_s: float
    sequence: int
    request_id: str
    num_prompt: int
    context: Context


@dataclass(frozen=True, slots=True)
class Stepped:
    """The decode loop has taken a step with these spans, one or more of each sequence."""

    began_s: float
    ended_s: float
    spans: tuple[Span, ...]
    is_prompt: bool


@dataclass(frozen=True, slots=True)
class Left:
    """A sequence is over; without a `reason` it broke off."""

    at_s: float
    sequence: int
    num_tokens: int
    reason: str | None


@dataclass(frozen=True, slots=True)
class Taken:
    """A sequence took `num_tokens` of what a decode step brought it, the first one certain and the others guesses of
    the shadow, of which the step had verified `num_guesses`."""

    at_s: float
    num_tokens: int
    num_guesses: int


Mark = Heard | Told | Called | Came | Stepped | Left | Taken


@dataclass(frozen=True, slots=True)
class Timeline:
    """Stamps what happens and hands it on; from any thread. `put` must not wait."""

    put: Callable[[Mark], None]
    clock: Callable[[], float]

    def came(self, sequence: int, *, request_id: str, num_prompt: int) -> None:
        """Somebody asks, in whose context this is called."""
        self.put(Came(self.clock(), sequence, request_id, num_prompt, copy_context()))

    def stepped(self, began_s: float, *, spans: Iterable[Span], is_prompt: bool) -> None:
        """A step is over."""
        self.put(Stepped(began_s, self.clock(), tuple(spans), is_prompt))

    def left(self, sequence: int, *, num_tokens: int, reason: str | None) -> None:
        """A sequence is over."""
        self.put(Left(self.clock(), sequence, num_tokens, reason))

    def taken(self, *, num_tokens: int, num_guesses: int) -> None:
        """A decode step brought a sequence tokens."""
        self.put(Taken(self.clock(), num_tokens, num_guesses))

    def heard(self, peer_id: str, message: AnyMessage) -> None:
        """A message has come."""
        self.put(Heard(self.clock(), peer_id, message))

    def told(self, peer_id: str, message: AnyMessage) -> None:
        """A message goes out now."""
        self.put(Told(self.clock(), peer_id, message))

    def called(
        self,
        began_s: float,
        *,
        call: LayerCall,
        predicted: frozenset[int],
        timings: Iterable[ExpertTiming],
        is_prompt: bool,
    ) -> None:
        """A layer's experts are computed."""
        self.put(Called(began_s, self.clock(), call, predicted, tuple(timings), is_prompt))


@dataclass(kw_only=True, slots=True)
class _Step:
    """The step of the decode loop under way."""

    spans: tuple[Span, ...]
    is_prompt: bool
    began_s: float
    experts_s: float = 0.0
    stalled_s: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)


@dataclass(kw_only=True, slots=True)
class Totals:
    """Of the decode steps drawn, prompts left out. `stalled_s`: time in which a layer waited for a load. `tokens` came
    of them; `guesses` of the shadow were verified, of which `agreed` were what the model said too."""

    tokens: int = 0
    guesses: int = 0
    agreed: int = 0
    steps_s: float = 0.0
    experts_s: float = 0.0
    stalled_s: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)

    def add(self, step: _Step, ended_s: float) -> None:
        """Count a step that is over."""
        self.steps_s += ended_s - step.began_s
        self.experts_s += step.experts_s
        self.stalled_s += step.stalled_s
        self.outcomes += step.outcomes

    def take(self, taken: Taken) -> None:
        """Count what became of a step."""
        self.tokens += taken.num_tokens
        self.guesses += taken.num_guesses
        self.agreed += taken.num_tokens - 1

    def summary(self) -> dict[str, float]:
        """For people."""
        return {
            "tokens": self.tokens,
            "guesses": self.guesses,
            "guesses_agreed": self.agreed,
            "time_ms": milliseconds(self.steps_s),
            "waiting_for_experts_ms": milliseconds(self.experts_s),
            "stalled_on_loads_ms": milliseconds(self.stalled_s),
            **{f"experts_{outcome}": self.outcomes[outcome] for outcome in ("hit", "late", "miss")},
        }


@dataclass(kw_only=True)
class Rendering:
    """Marks to events, one after the other."""

    num_layers: int
    drawing: Drawing
    totals: Totals = field(default_factory=Totals)
    # Node -> (shortest time a request took beyond what the node told of, how many requests, their sum).
    ways_s: dict[str, tuple[float, int, float]] = field(default_factory=dict)
    _open: OrderedDict[int, Told] = field(default_factory=OrderedDict)
    _forecast_s: OrderedDict[tuple[int, int, int], float] = field(default_factory=OrderedDict)
    _aligned: tuple[int, int, float] | None = None
    _last_forecast_s: float | None = None
    _step: _Step | None = None
    _last_done: tuple[frozenset[int], float] | None = None
    _stalled_s: float = 0.0  # longest of the nodes' waits for loads in the call under way

    def events(self, mark: Mark) -> list[Event]:
        """What a mark adds to the drawing."""
        match mark:
            case Called() | Taken():
                self._decoded(mark)
            case Told(message=Compute(request_id=request_id)):
                _remember(self._open, request_id, mark)
            case Told(message=Align(sequence=sequence, position=position)):
                self._aligned = (sequence, position, mark.at_s)
            case Heard(message=Result() as result):
                for loaded in result.loaded:
                    self._loaded(mark, loaded)
                self._answered(mark, result)
            case Heard(message=ComputeFailed(request_id=request_id, code=code)):
                self._open.pop(request_id, None)
                self.drawing.instant(_node(mark.peer_id), "send", f"failed: {code}", mark.at_s)
            case Heard(message=Loaded() as loaded):
                self._loaded(mark, loaded)
            case Heard(message=LoadFailed(layer=layer, expert=expert)):
                self.drawing.instant(_node(mark.peer_id), "load", f"failed: L{layer} E{expert}", mark.at_s)
            case Heard(message=Schedule() as schedule):
                self._forecast(mark, schedule)
        return self.drawing.take()

    # ------------------------------------------------------------------------------------------------- the nodes

    def _answered(self, mark: Heard, result: Result) -> None:
        told = self._open.get(result.request_id)
        if told is None or told.peer_id != mark.peer_id or not result.timings:
            return
        del self._open[result.request_id]
        on_node_s = max(timing.wait_s + timing.compute_s for timing in result.timings)
        came_s = max(told.at_s, mark.at_s - on_node_s)
        self._learn_way(mark.peer_id, came_s - told.at_s)
        node = _node(mark.peer_id)
        self.drawing.slice(node, "send", f"L{result.layer}", told.at_s, came_s, request=result.request_id)
        free_s, stalled_s = came_s, 0.0
        for timing in sorted(result.timings, key=lambda timing: timing.wait_s):
            name = f"L{result.layer} E{timing.expert}"
            began_s = min(came_s + timing.wait_s, mark.at_s)
            ended_s = min(began_s + timing.compute_s, mark.at_s)
            if began_s > free_s:
                self.drawing.slice(node, "wait", name, free_s, began_s, outcome=timing.outcome)
                stalled_s += 0.0 if timing.outcome == "hit" else began_s - free_s
            self.drawing.slice(node, "compute", name, began_s, ended_s, outcome=timing.outcome)
            free_s = max(free_s, ended_s)
        self._stalled_s = max(self._stalled_s, stalled_s)

    def _loaded(self, mark: Heard, loaded: Loaded) -> None:
        name = f"L{loaded.layer} E{loaded.expert}"
        facts = {"on_demand": loaded.on_demand, "bytes": loaded.load_bytes}
        ended_s = mark.at_s - loaded.ago_s
        self.drawing.slice(_node(mark.peer_id), "load", name, ended_s - loaded.load_s, ended_s, **facts)

    def _learn_way(self, peer_id: str, way_s: float) -> None:
        shortest_s, count, sum_s = self.ways_s.get(peer_id, (way_s, 0, 0.0))
        self.ways_s[peer_id] = (min(shortest_s, way_s), count + 1, sum_s + way_s)

    # --------------------------------------------------------------------------------------------- the predictor

    def _forecast(self, mark: Heard, schedule: Schedule) -> None:
        """The shadow works on one layer after the other: since the forecast before, or, at a token's first layer,
        since the token was sent to it, if that came later."""
        span, layer = schedule.span, schedule.layer
        began_s = mark.at_s if self._last_forecast_s is None else self._last_forecast_s
        if layer == 0 and self._aligned is not None and self._aligned[:2] == (span.sequence, span.position):
            began_s = self._aligned[2] if self._last_forecast_s is None else max(began_s, self._aligned[2])
        self._last_forecast_s = mark.at_s
        _remember(self._forecast_s, (span.sequence, span.position, layer), mark.at_s)
        facts = {"sequence": span.sequence, "position": span.position, "experts": schedule.experts}
        self.drawing.slice(PREDICTOR, f"layer {layer}", f"shadow L{layer}", began_s, mark.at_s, **facts)

    # ------------------------------------------------------------------------------------------------ the server

    def _decoded(self, mark: Called | Taken) -> None:
        if isinstance(mark, Taken):
            self.totals.take(mark)
        else:
            self._called(mark)

    def _called(self, mark: Called) -> None:
        layer, sequences = mark.call.layer, frozenset(span.sequence for span in mark.call.spans)
        # Between the calls of one answer the decode loop is at work; between answers it may have been idle.
        follows = self._last_done is not None and self._last_done[0] == sequences
        own_s = self._last_done[1] if self._last_done is not None and follows else mark.began_s
        row = f"layer {layer}"
        if own_s < mark.began_s:
            covers = "attention, norms, gate" if layer else "head, sampling, alignment, embedding, attention, gate"
            self.drawing.slice(SERVER, row, f"own work L{layer}", own_s, mark.began_s, covers=covers)
        facts = self._facts_of_call(mark)
        self.drawing.slice(SERVER, row, f"experts L{layer}", mark.began_s, mark.ended_s, **facts)
        self._last_done = (sequences, mark.ended_s)
        self._add_to_step(mark, own_s)

    def _add_to_step(self, mark: Called, own_s: float) -> None:
        step = self._step
        if step is None or step.spans != mark.call.spans or mark.call.layer == 0:
            step = self._step = _Step(spans=mark.call.spans, is_prompt=mark.is_prompt, began_s=own_s)
        step.experts_s += mark.ended_s - mark.began_s
        step.stalled_s += self._stalled_s
        step.outcomes.update(timing.outcome for timing in mark.timings)
        self._stalled_s = 0.0
        if mark.call.layer == self.num_layers - 1:
            self._end_step(step, mark.ended_s)

    def _end_step(self, step: _Step, ended_s: float) -> None:
        self._step = None
        if not step.is_prompt:
            self.totals.add(step, ended_s)
        facts = {
            "spans": [[span.sequence, span.position, span.length] for span in step.spans],
            "waiting_for_experts_ms": milliseconds(step.experts_s),
            "stalled_on_loads_ms": milliseconds(step.stalled_s),
        }
        name = f"{'prompt' if step.is_prompt else 'token'} {step.spans[0].position}"
        self.drawing.slice(SERVER, "step", name, step.began_s, ended_s, **facts)

    def _facts_of_call(self, mark: Called) -> dict[str, Any]:
        call = mark.call
        came = [self._forecast_s.get((span.sequence, span.position, call.layer)) for span in call.spans]
        first_s = min((at_s for at_s in came if at_s is not None), default=None)
        lead = {} if first_s is None else {"forecast_lead_ms": milliseconds(mark.began_s - first_s)}
        return {
            "experts": sorted(call.counts),
            "forecast": sorted(mark.predicted),
            "outcomes": {str(timing.expert): timing.outcome for timing in mark.timings},
            **lead,
        }


def _node(peer_id: str) -> str:
    return f"node {peer_id}"


def _remember(book: "OrderedDict[KeyT, ValueT]", key: KeyT, value: ValueT) -> None:
    """Note something that may never be asked for: the oldest go first."""
    book[key] = value
    while len(book) > MAX_OPEN:
        book.popitem(last=False)
