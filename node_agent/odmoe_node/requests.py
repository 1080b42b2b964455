"""The computes a node has in hand: what each still needs, and how each expert's time was spent. Pure."""

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

from odmoe_node.events import ExpertKey
from odmoe_node.recent import Recent
from odmoe_wire.messages import Compute, ExpertTiming, Result

Outcome = Literal["hit", "late", "miss"]
MAX_REMEMBERED_REQUESTS = 4096


@dataclass(slots=True, eq=False)
class Request:
    """One `Compute` in hand. An expert is first in `pending` (in the order asked for), then in `started_s` as
    well while it is computed, at last in `timings` only. `foreseen` experts were wanted before it came; `reused` ones
    had been computed since they were loaded."""

    message: Compute
    number: int
    arrived_s: float
    sequences: set[int]
    pending: dict[int, Outcome]
    foreseen: frozenset[int]
    reused: frozenset[int] = frozenset()
    started_s: dict[int, float] = field(default_factory=dict)
    timings: dict[int, ExpertTiming] = field(default_factory=dict)
    passed_over: int = 0

    @property
    def request_id(self) -> int:
        return self.message.request_id

    @property
    def deadline_s(self) -> float:
        return self.arrived_s + self.message.ttl_s

    def key(self, expert: int) -> ExpertKey:
        return ExpertKey(self.message.layer, expert)

    def runs(self, expert: int) -> tuple[int, ...]:
        """How many token rows each run of the expert has."""
        return runs_of(self.message)[expert]

    def waiting(self) -> list[int]:
        """Experts whose computing has not begun."""
        return [expert for expert in self.pending if expert not in self.started_s]

    def result(self) -> Result:
        timings = [self.timings[expert] for expert in self.message.experts]
        return Result(request_id=self.request_id, layer=self.message.layer, timings=timings)


def runs_of(message: Compute) -> dict[int, tuple[int, ...]]:
    """Expert -> its runs."""
    experts, counts = message.experts, message.counts
    if not message.runs:
        return {expert: (count,) for expert, count in zip(experts, counts, strict=True)}
    ends = {end: number for number, end in enumerate(accumulate(message.runs), start=1)}
    cuts = [0, *(ends[end] for end in accumulate(counts))]
    return {expert: tuple(message.runs[cuts[i] : cuts[i + 1]]) for i, expert in enumerate(experts)}


class RequestBook:
    """Requests in order of arrival, who waits for which key, and the ids of those lately ended."""

    def __init__(self) -> None:
        self._requests: dict[int, Request] = {}
        self._waiting: dict[ExpertKey, list[Request]] = {}  # oldest first
        self._ended: Recent[int, None] = Recent(MAX_REMEMBERED_REQUESTS)
        self._next_number = 0

    def __len__(self) -> int:
        return len(self._requests)

    def all(self) -> list[Request]:
        """In order of arrival."""
        return list(self._requests.values())

    def seen(self, request_id: int) -> bool:
        return request_id in self._requests or request_id in self._ended

    def get(self, request_id: int) -> Request | None:
        return self._requests.get(request_id)

    def waited_for(self, key: ExpertKey) -> bool:
        return key in self._waiting

    def oldest_waiting(self, key: ExpertKey) -> Request:
        return self._waiting[key][0]

    def first_absent(self, resident: Container[ExpertKey]) -> tuple[Request, ExpertKey] | None:
        """The first need, by arrival, of an expert that is in no slot."""
        for request in self._requests.values():
            for expert in request.waiting():
                if request.key(expert) not in resident:
                    return request, request.key(expert)
        return None

    def next_deadline_s(self) -> float | None:
        return min((request.deadline_s for request in self._requests.values()), default=None)

    def open(
        self,
        message: Compute,
        now: float,
        outcomes: Mapping[int, Outcome],
        foreseen: frozenset[int],
        *,
        reused: frozenset[int] = frozenset(),
    ) -> None:
        assert outcomes, "the wire lets no compute without experts through"
        sequences = {span.sequence for span in message.spans}
        request = Request(message, self._next_number, now, sequences, dict(outcomes), foreseen, reused)
        self._next_number += 1
        self._requests[message.request_id] = request
        for expert in outcomes:
            self._waiting.setdefault(request.key(expert), []).append(request)

    def start(self, request: Request, expert: int, now: float) -> None:
        """The computing of one of its experts begins."""
        request.started_s[expert] = now
        self._leave(request, expert)

    def take_back(self, request: Request, expert: int) -> None:
        """The computing of one of its experts, begun for the oldest request that waited, came to nothing: it waits
        again."""
        del request.started_s[expert]
        self._waiting.setdefault(request.key(expert), []).insert(0, request)

    def finish(self, request: Request, expert: int, compute_s: float, *, waited_s: float) -> bool:
        """The computing of one of its experts is done, having waited so long since its start; true when it was the
        last."""
        outcome = request.pending.pop(expert)
        wait_s = max(request.started_s.pop(expert) - request.arrived_s, 0.0) + waited_s
        request.timings[expert] = ExpertTiming(expert, outcome, wait_s, compute_s, expert not in request.reused)
        return not request.pending

    def close(self, request: Request) -> None:
        """The request is over, however it ended; its id is remembered."""
        for expert in request.waiting():
            self._leave(request, expert)
        del self._requests[request.request_id]
        self._ended.put(request.request_id, None)

    def clear(self) -> None:
        self._requests.clear()
        self._waiting.clear()
        self._ended.clear()

    def check_integrity(self) -> None:
        """Assert that no request is complete or forgotten and that the index of needs is right."""
        needs: dict[ExpertKey, list[Request]] = {}
        for request in self._requests.values():
            assert request.pending, f"request {request.request_id} has nothing left to wait for"
            assert set(request.started_s) <= set(request.pending)
            assert set(request.pending) | set(request.timings) == set(request.message.experts)
            for expert in request.waiting():
                needs.setdefault(request.key(expert), []).append(request)
        assert needs == self._waiting

    def _leave(self, request: Request, expert: int) -> None:
        waiting = self._waiting[request.key(expert)]
        waiting.remove(request)
        if not waiting:
            del self._waiting[request.key(expert)]
