"""Decoding one sequence, event by event: loads, computes and messages of every node, token after token.

Knows the seconds of each step, not what they are made of. Wrong forecasts are drawn from a seeded generator, so the
same arguments give the same answer. An expert leaves its slot once computed and is never found there again; what a
shadow that ran ahead on a wrong token had loaded is taken to be gone at no cost.
"""

import heapq
from collections import deque
from dataclasses import dataclass, field
from random import Random

from odmoe_server.planner.forecasts import Forecast, Schedule, right
from odmoe_server.planner.machines import Machines, Times
from odmoe_wire import placement
from odmoe_wire.messages import Member


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """`ends_s`: when each token ended. `stalled_s`: time in which a layer waited for loads. `loads` were made,
    `reloads` of them because a forecast was wrong or not there in time to begin."""

    ends_s: tuple[float, ...]
    stalled_s: float
    loads: int
    reloads: int

    @property
    def tokens_per_s(self) -> float:
        return len(self.ends_s) / self.ends_s[-1]

    @property
    def stall_share(self) -> float:
        return self.stalled_s / self.ends_s[-1]


@dataclass(eq=False)
class _Job:
    """One expert of one layer of one token, on the node that was dealt it."""

    known_s: float
    right: bool
    ready_s: float | None = None


@dataclass(eq=False)
class _Lane:
    """One node: its link, its slots and its device, each of which does one thing at a time."""

    load_s: float
    free_slots_s: list[float]
    queue: deque[_Job] = field(default_factory=deque)
    link_free_s: float = 0.0
    device_free_s: float = 0.0
    loads: int = 0
    reloads: int = 0

    def begin_forecasts(self, until_s: float) -> None:
        """Begin, in order, those loads of forecasts that can begin before `until_s`."""
        while self.queue and self.free_slots_s:
            begin_s = max(self.queue[0].known_s, self.link_free_s, self.free_slots_s[0])
            if begin_s >= until_s:
                return
            heapq.heappop(self.free_slots_s)
            self.queue.popleft().ready_s = self._load(begin_s)

    def compute(self, job: _Job, arrival_s: float, *, expert_s: float) -> tuple[float, float]:
        """Compute the expert whose rows arrive then; returns when it was in its slot and when it was computed.

        A wrong expert's slot is taken over. A forecast whose load has not begun gives way to the right load."""
        self.begin_forecasts(arrival_s)
        if job.ready_s is None:
            self.queue.remove(job)
            slot_s = heapq.heappop(self.free_slots_s)
            ready_s = self._reload(max(arrival_s, slot_s))
        elif not job.right:
            ready_s = self._reload(arrival_s)
        else:
            ready_s = job.ready_s
        self.device_free_s = max(ready_s, arrival_s, self.device_free_s) + expert_s
        heapq.heappush(self.free_slots_s, self.device_free_s)
        return ready_s, self.device_free_s

    def _load(self, begin_s: float) -> float:
        self.link_free_s = begin_s + self.load_s
        self.loads += 1
        return self.link_free_s

    def _reload(self, asked_s: float) -> float:
        self.reloads += 1
        return self._load(max(asked_s, self.link_free_s))


def decode(
    machines: Machines,
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
    run = _Run(machines, times, forecast, layers=layers, num_experts=num_experts, top_k=top_k, seed=seed)
    for token in range(tokens):
        run.decode(token)
    return run.decoded()


class _Run:
    def __init__(
        self,
        machines: Machines,
        times: Times,
        forecast: Forecast,
        *,
        layers: int,
        num_experts: int,
        top_k: int,
        seed: int,
    ) -> None:
        self._times = times
        self._forecast = forecast
        self._num_experts, self._top_k = num_experts, top_k
        # One generator for each purpose, so that comparisons between settings meet the same draws.
        self._right_random = Random(seed)
        self._schedule = Schedule(forecast, times, layers=layers, random=Random(seed + 1))
        self._lanes = [
            _Lane(load_s, [0.0] * node.slots) for node, load_s in zip(machines.nodes, times.load_s, strict=True)
        ]
        members = [Member(node_id=str(index), slots=node.slots) for index, node in enumerate(machines.nodes)]
        self._dealt = [
            sorted(int(node) for node in placement.place(layer, range(top_k), members, machines.group_size).values())
            for layer in range(layers)
        ]
        self._jobs: dict[int, list[list[_Job]]] = {}
        self._ends_s: list[float] = []
        self._waits = False
        self._clock_s = self._stalled_s = 0.0

    def decode(self, token: int) -> None:
        """One token: its layers one after the other."""
        if token not in self._jobs:
            self._announce(token)
        self._waits = self._schedule.waits(token + 1)
        if not self._waits:
            self._announce(token + 1)
        for layer, jobs in enumerate(self._jobs.pop(token)):
            self._layer(layer, jobs)
        self._ends_s.append(self._clock_s)

    def _announce(self, token: int) -> None:
        """Queue a token's jobs at the nodes they are dealt to, each with the time its forecast gets there."""
        known_s = self._schedule.known_s(token, ends_s=self._ends_s, waits=self._waits)
        self._jobs[token] = []
        for layer, dealt in enumerate(self._dealt):
            found = right(
                self._forecast, token, num_experts=self._num_experts, top_k=self._top_k, random=self._right_random
            )
            jobs = [_Job(known_s[layer], is_right) for is_right in found]
            for job, node in zip(jobs, dealt, strict=True):
                self._lanes[node].queue.append(job)
            self._jobs[token].append(jobs)

    def _layer(self, layer: int, jobs: list[_Job]) -> None:
        times = self._times
        gate_s = self._clock_s + times.main_s
        dealt = self._dealt[layer]
        order = {node: position for position, node in enumerate(dict.fromkeys(dealt))}
        computed: list[float] = []
        stalled_s = 0.0
        for job, node in zip(jobs, dealt, strict=True):
            arrival_s = gate_s + (order[node] + 1) * times.row_s + times.latency_s
            ready_s, end_s = self._lanes[node].compute(job, arrival_s, expert_s=times.expert_s)
            stalled_s = max(stalled_s, ready_s - arrival_s)
            computed.append(end_s)
        for end_s in sorted(computed):
            self._clock_s = max(self._clock_s, end_s + times.latency_s) + times.row_s
        self._stalled_s += stalled_s

    def decoded(self) -> Decoded:
        """What came of it."""
        return Decoded(
            ends_s=tuple(self._ends_s),
            stalled_s=self._stalled_s,
            loads=sum(lane.loads for lane in self._lanes),
            reloads=sum(lane.reloads for lane in self._lanes),
        )
