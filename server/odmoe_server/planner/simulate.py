"""Decoding one sequence, event by event: loads, computes and messages of every node, token after token.

Knows the seconds of each step, not what they are made of. Wrong forecasts are drawn from a seeded generator, so the
same arguments give the same answer. An expert is never found in a slot again, but for the share that is to be said of
a cache. What a shadow that ran ahead on a wrong
token had ordered is void at once and costs nothing: its loads are broken off when others are needed.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

from odmoe_server.planner.forecasts import Forecast, Schedule, right
from odmoe_server.planner.machines import Crew, Times, members
from odmoe_server.planner.rig import Job, Rig
from odmoe_wire import placement


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """`ends_s`: when each token ended. `stalled_s`: time in which a layer waited for loads. `loads` were begun,
    `reloads` of them because a forecast was wrong or not there in time to begin, and `broken_off` not ended."""

    ends_s: tuple[float, ...]
    stalled_s: float
    loads: int
    reloads: int
    broken_off: int

    @classmethod
    def by(cls, rig: Rig, ends_s: Iterable[float]) -> "Decoded":
        """What the rig has come to."""
        return cls(
            ends_s=tuple(ends_s),
            stalled_s=rig.stalled_s,
            loads=sum(lane.loads for lane in rig.lanes),
            reloads=sum(lane.reloads for lane in rig.lanes),
            broken_off=sum(lane.broken_off for lane in rig.lanes),
        )

    @property
    def tokens_per_s(self) -> float:
        return len(self.ends_s) / self.ends_s[-1]

    @property
    def stall_share(self) -> float:
        return self.stalled_s / self.ends_s[-1]


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
    """Decode so many tokens after a prompt that has just ended."""
    run = _Run(crew, times, forecast, layers=layers, num_experts=num_experts, top_k=top_k, seed=seed)
    for token in range(tokens):
        run.decode(token)
    return run.decoded()


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
        self._forecast = forecast
        self._num_experts, self._top_k = num_experts, top_k
        # One generator for each purpose, so that comparisons between settings meet the same draws.
        self._right_random = Random(seed)
        self._schedule = Schedule(forecast, times, layers=layers, random=Random(seed + 1))
        self._rig = Rig(crew, times.load_s)
        self._times = times
        self._dealt = deal(crew, layers=layers, top_k=top_k)
        self._jobs: dict[int, list[dict[int, list[Job]]]] = {}
        self._ends_s: list[float] = []
        self._waits = False

    def decode(self, token: int) -> None:
        """One token: its layers one after the other."""
        if token not in self._jobs:
            self._announce(token)
        self._waits = self._schedule.waits(token + 1)
        if not self._waits:
            self._announce(token + 1)
        for jobs in self._jobs.pop(token):
            self._rig.layer(jobs, self._times)
        self._ends_s.append(self._rig.clock_s)

    def _announce(self, token: int) -> None:
        """Queue a token's jobs at the nodes they are dealt to, each with the time its forecast gets there."""
        known_s = self._schedule.known_s(token, ends_s=self._ends_s, waits=self._waits)
        self._jobs[token] = []
        for layer, dealt in enumerate(self._dealt):
            found = right(
                self._forecast, token, num_experts=self._num_experts, top_k=self._top_k, random=self._right_random
            )
            jobs: dict[int, list[Job]] = {}
            for is_right, node in zip(found, dealt, strict=True):
                is_there = self._forecast.source == "slots" and is_right
                job = Job(known_s[layer], is_right, 0.0 if is_there else None)
                jobs.setdefault(node, []).append(job)
                self._rig.announce(node, job)
            self._jobs[token].append(jobs)

    def decoded(self) -> Decoded:
        """What came of it."""
        return Decoded.by(self._rig, self._ends_s)


def deal(crew: Crew, *, layers: int, top_k: int) -> list[list[int]]:
    """For each layer, the nodes that have its experts, one entry an expert."""
    nodes, experts = members(crew), range(top_k)
    return [
        sorted(int(node) for node in placement.place(layer, experts, nodes, crew.group_size, layers).values())
        for layer in range(layers)
    ]
