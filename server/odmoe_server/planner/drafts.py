"""Decoding with guesses: each step takes the newest token and behind it those the shadow has gone on with so far.

Knows steps of several tokens, and which guesses come out right; knows no shapes. All tokens of a step share an expert's
load and, but for `EXTRA_ROW`, its computing; experts are drawn evenly and independently for every token, each on the
node that placement gives it whatever else is needed. A guess that was wrong is loaded and computed for like any other;
then the shadow begins again, and the next step has no guesses. What further rows add to a message is left out, and how
many guesses will be known is foreseen by how long the step before took.
"""

from dataclasses import replace
from random import Random
from typing import Final

from odmoe_server.planner import simulate
from odmoe_server.planner.forecasts import Forecast
from odmoe_server.planner.machines import Crew, Times, members
from odmoe_server.planner.rig import Job, Rig
from odmoe_server.planner.simulate import Decoded
from odmoe_wire import placement

# What each further row of an expert takes, as a share of the first: four rows of float32 take 2.7 times as long as one
# (measured; see `odmoe_model.runs`).
EXTRA_ROW: Final = 0.55


def decode(
    crew: Crew,
    times: Times,
    forecast: Forecast,
    *,
    layers: int,
    num_experts: int,
    top_k: int,
    tokens: int,
    seed: int = 0,
) -> Decoded:
    """Decode so many tokens after a prompt that has just ended, with guesses if the forecasts have any."""
    if not forecast.draft:
        return simulate.decode(
            crew, times, forecast, layers=layers, num_experts=num_experts, top_k=top_k, tokens=tokens, seed=seed
        )
    run = _Run(crew, times, forecast, layers=layers, num_experts=num_experts, top_k=top_k, seed=seed)
    while len(run.ends_s) < tokens:
        run.step()
    return run.decoded(tokens)


class Ahead:
    """The shadow: when it begins each position, and which of its tokens are right. `latency_s` is what its word takes
    to the server."""

    def __init__(self, forecast: Forecast, times: Times, *, layers: int, random: Random) -> None:
        self._run_ahead, self._agreement = forecast.run_ahead, forecast.agreement
        self._token_s, self._layer_s, self._latency_s = layers * times.shadow_s, times.shadow_s, times.latency_s
        self._random = random
        self._begins_s: dict[int, float] = {}
        self._free_s = forecast.begins_s
        self._next = 0
        self._wrong: dict[int, bool] = {}

    def aligned(self, position: int, now_s: float) -> None:
        """The full model has come to a position: the shadow may go on to so many beyond it."""
        while self._next <= position + self._run_ahead:
            self._begins_s[self._next] = max(self._free_s, now_s)
            self._free_s = self._begins_s[self._next] + self._token_s
            self._next += 1

    def guesses(self, position: int, now_s: float, *, most: int) -> int:
        """How many tokens behind the one at a position the server has heard of."""
        said_s = self._layer_s + self._latency_s
        known = 0
        while known < most and self._begins_s.get(position + known + 1, now_s) + said_s <= now_s:
            known += 1
        return known

    def has_begun(self, position: int) -> bool:
        """Whether a forecast of the position is out or under way."""
        return position in self._begins_s

    def is_right(self, position: int) -> bool:
        """Whether the token the shadow took a position for is the full model's; it is where the shadow has waited for
        that one."""
        if position not in self._wrong:
            self._wrong[position] = self.has_begun(position) and self._random.random() >= self._agreement
        return not self._wrong[position]

    def known_s(self, position: int, layer: int) -> float:
        """When the forecast of a layer reaches the nodes."""
        return self._begins_s[position] + (layer + 1) * self._layer_s + self._latency_s

    def begin_anew(self, position: int, now_s: float) -> None:
        """Its token for the position was wrong; the right one has come."""
        for void in range(position, self._next):
            del self._begins_s[void]
        self._next = position
        self._free_s = now_s + self._latency_s


class _Run:
    def __init__(
        self,
        crew: Crew,
        times: Times,
        forecast: Forecast,
        *,
        layers: int,
        num_experts: int,
        top_k: int,
        seed: int,
    ) -> None:
        self.ends_s: list[float] = []
        self._most, self._recall = forecast.draft, forecast.recall_at(0)
        self._times, self._layers = times, layers
        self._num_experts, self._top_k = num_experts, top_k
        # One generator for each purpose, so that comparisons between settings meet the same draws.
        self._gates, self._right_random = Random(seed), Random(seed + 1)
        self._shadow = Ahead(forecast, times, layers=layers, random=Random(seed + 2))
        self._rig = Rig(crew, times.load_s)
        nodes = members(crew)
        self._where = [
            placement.place(layer, range(num_experts), nodes, crew.group_size, layers, placing="expert")
            for layer in range(layers)
        ]
        # Of the next step: its experts by node, layer by layer, and how many tokens it takes.
        self._jobs: list[dict[int, list[Job]]] = []
        self._width = 0
        self._took_s = 0.0

    def step(self) -> None:
        """Take what is known through all layers; meanwhile nodes hear of the step that follows, if it is foreseen."""
        at, began_s = len(self.ends_s), self._rig.clock_s
        self._shadow.aligned(at, began_s)
        if not self._jobs:
            self._announce(at, known_by_s=began_s)
        jobs, width = self._jobs, self._width
        self._jobs = []
        kept = 1
        while kept < width and self._shadow.is_right(at + kept):
            kept += 1
        is_right = self._shadow.is_right(at + kept)
        if is_right and self._shadow.has_begun(at + kept):
            self._announce(at + kept, known_by_s=began_s + self._took_s)
        step_times = replace(self._times, main_s=width * self._times.main_s)
        for dealt in jobs:
            self._rig.layer(dealt, step_times)
        if not is_right:
            self._shadow.begin_anew(at + kept, self._rig.clock_s)
        self._took_s = self._rig.clock_s - began_s
        self.ends_s += [self._rig.clock_s] * kept

    def decoded(self, tokens: int) -> Decoded:
        """What came of it."""
        return Decoded.by(self._rig, self.ends_s[:tokens])

    def _announce(self, at: int, *, known_by_s: float) -> None:
        """Queue the jobs of the step that begins with a position at their nodes, in the order in which they are
        needed."""
        self._width = 1 + self._shadow.guesses(at, known_by_s, most=self._most)
        for layer in range(self._layers):
            known_s: dict[int, list[float]] = {}
            for position in range(at, at + self._width):
                for expert in self._gates.sample(range(self._num_experts), self._top_k):
                    known_s.setdefault(expert, []).append(self._shadow.known_s(position, layer))
            jobs: dict[int, list[Job]] = {}
            for expert in sorted(known_s):
                node, rows = int(self._where[layer][expert]), len(known_s[expert])
                is_right = self._right_random.random() >= (1 - self._recall) ** rows
                job = Job(min(known_s[expert]), is_right, work=1 + EXTRA_ROW * (rows - 1))
                jobs.setdefault(node, []).append(job)
                self._rig.announce(node, job)
            self._jobs.append(jobs)
