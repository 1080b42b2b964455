"""The machines at work on one layer after the other: links, slots, cores and messages.

Knows seconds, and which node was dealt what; knows no tokens, no shapes and nothing of who forecasts.

A node's link carries one load at a time. A load the gate shows to be wrong is broken off, and the right one begins at
once; for a load that a layer waits for, that of a forecast for a later layer is broken off too, unless it is nearly
done. An expert leaves its slot when it was computed. Its first stage may be computed while the rest is on the link.
"""

import heapq
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from odmoe_server.planner.machines import Crew, Times

# A forecast's load with no more than this share of it to go is not broken off; the node agents' own rule.
NEAR_THE_END: Final = 0.25


@dataclass(eq=False)
class Job:
    """One expert of one layer, on the node that was dealt it; its forecast gets there at `known_s`. `work`: what it
    takes to compute, as a multiple of one row."""

    known_s: float
    right: bool = True
    ready_s: float | None = None
    work: float = 1.0


class Turn(NamedTuple):
    """A `share` of an expert's computing that can begin at `at_s`; all of it is in its slot at `loaded_s`, and it takes
    `expert_s` in all."""

    at_s: float
    node: int
    loaded_s: float
    expert_s: float
    share: float = 1.0


@dataclass(eq=False)
class Lane:
    """One node: its link, and when each of its slots is free."""

    load_s: float
    free_slots_s: list[float]
    queue: deque[Job] = field(default_factory=deque)
    loads: int = 0
    reloads: int = 0
    broken_off: int = 0
    _link_free_s: float = 0.0
    _loading: Job | None = None
    _called: Collection[Job] = ()

    def gate(self, jobs: Collection[Job], now_s: float) -> None:
        """The gate has spoken, and `jobs` are what this node has to do for it."""
        self._begin_forecasts(now_s)
        self._called = jobs
        loading = self._loading
        if loading in jobs and loading is not None and not loading.right and self._link_free_s > now_s:
            self._break_off(now_s)

    def fetch(self, job: Job, now_s: float) -> float:
        """When the right expert is in its slot, if it is asked for now.

        A wrong expert's slot is taken over. A forecast whose load has not begun gives way to the right load."""
        self._begin_forecasts(now_s)
        if job.ready_s is None:
            self.queue.remove(job)
            self._make_way(now_s)
            return self._reload(max(now_s, heapq.heappop(self.free_slots_s)))
        if job.right:
            return max(now_s, job.ready_s)
        self._make_way(now_s)
        return self._reload(now_s)

    def free(self, at_s: float) -> None:
        """A slot is free from then on."""
        heapq.heappush(self.free_slots_s, at_s)

    def _begin_forecasts(self, until_s: float) -> None:
        """Begin, in order, those loads of forecasts that can begin before `until_s`."""
        while self.queue and self.free_slots_s:
            begin_s = max(self.queue[0].known_s, self._link_free_s, self.free_slots_s[0])
            if begin_s >= until_s:
                return
            heapq.heappop(self.free_slots_s)
            self._loading = self.queue.popleft()
            self._loading.ready_s = self._load(begin_s)

    def _make_way(self, now_s: float) -> None:
        """Break off the load of a forecast for a later layer; it will be begun again."""
        job = self._loading
        if job is None or job in self._called or self._link_free_s - now_s <= NEAR_THE_END * self.load_s:
            return
        self._break_off(now_s)
        job.ready_s = None
        self.queue.appendleft(job)
        self.free(now_s)

    def _break_off(self, now_s: float) -> None:
        self._link_free_s, self._loading = now_s, None
        self.broken_off += 1

    def _load(self, begin_s: float) -> float:
        self._link_free_s = begin_s + self.load_s
        self.loads += 1
        return self._link_free_s

    def _reload(self, asked_s: float) -> float:
        self.reloads += 1
        self._loading = None
        return self._load(max(asked_s, self._link_free_s))


class Rig:
    """The server and all nodes, from the moment their slots are empty."""

    def __init__(self, crew: Crew, load_s: Sequence[float]) -> None:
        nodes = zip(crew.nodes, load_s, strict=True)
        self.lanes = [Lane(node_load_s, [0.0] * node.slots) for node, node_load_s in nodes]
        self.clock_s = self.stalled_s = 0.0
        self._shared_core = crew.shared_core
        self._core_free_s = [0.0] * (1 if crew.shared_core else len(self.lanes))

    def announce(self, node: int, job: Job) -> None:
        """Queue a job at its node, unless its expert is there; jobs must come in the order in which they are needed."""
        if job.ready_s is None:
            self.lanes[node].queue.append(job)

    def layer(self, dealt: Mapping[int, Sequence[Job]], times: Times) -> None:
        """One layer: the server's part, the rows to the nodes, their experts, the results."""
        gate_s = self.clock_s + times.main_s
        arrival_s = {
            node: gate_s + (position + 1) * times.row_s + times.latency_s for position, node in enumerate(dealt)
        }
        if self._shared_core:
            self._core_free_s[0] = gate_s + len(dealt) * times.row_s
        for node, jobs in dealt.items():
            self.lanes[node].gate(jobs, arrival_s[node])
        computed = self._compute(dealt, arrival_s, times)
        self.clock_s = gate_s
        for end_s in sorted(computed):
            self.clock_s = max(self.clock_s, end_s + times.latency_s) + times.row_s

    def _compute(self, dealt: Mapping[int, Sequence[Job]], arrival_s: Mapping[int, float], times: Times) -> list[float]:
        """When each expert was done. A node takes its experts in order; a core that all share goes to the node that can
        begin first, whose slot then is free first as well."""
        left = {node: deque(jobs) for node, jobs in dealt.items()}
        can_begin = [self._fetch(node, left[node], arrival_s[node], times) for node in dealt]
        heapq.heapify(can_begin)
        ends_s: list[float] = []
        waited_s = 0.0
        while can_begin:
            turn = heapq.heappop(can_begin)
            if turn.share == 1.0:
                waited_s = max(waited_s, turn.at_s - arrival_s[turn.node])
            if turn.at_s < turn.loaded_s:
                end_s = self._run(turn, times.first_stage * turn.expert_s)
                waited_s = max(waited_s, turn.at_s - arrival_s[turn.node] + turn.loaded_s - end_s)
                begin_s = max(end_s, turn.loaded_s)
                rest = Turn(begin_s, turn.node, turn.loaded_s, turn.expert_s, 1 - times.first_stage)
                heapq.heappush(can_begin, rest)
                continue
            ends_s.append(self._run(turn, turn.share * turn.expert_s, row_s=times.row_s))
            self.lanes[turn.node].free(ends_s[-1])
            if left[turn.node]:
                heapq.heappush(can_begin, self._fetch(turn.node, left[turn.node], arrival_s[turn.node], times))
        self.stalled_s += waited_s
        return ends_s

    def _fetch(self, node: int, jobs: deque[Job], now_s: float, times: Times) -> Turn:
        """When the node's next expert can be begun: when all of it is there, or as much as its first stage needs."""
        lane = self.lanes[node]
        job = jobs.popleft()
        loaded_s, expert_s = lane.fetch(job, now_s), job.work * times.expert_s
        if not times.first_stage:
            return Turn(loaded_s, node, loaded_s, expert_s)
        return Turn(max(now_s, loaded_s - (1 - times.first_stage) * lane.load_s), node, loaded_s, expert_s)

    def _run(self, turn: Turn, compute_s: float, *, row_s: float = 0.0) -> float:
        """Compute an expert, or a stage of it, on its node's core; returns when it is done."""
        core = 0 if self._shared_core else turn.node
        end_s = max(turn.at_s, self._core_free_s[core]) + compute_s
        # On a core that all share, the result's message comes before the next expert.
        self._core_free_s[core] = end_s + (row_s if self._shared_core else 0.0)
        return end_s
