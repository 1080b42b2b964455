"""Which experts are wanted, by whom, and which of them is needed first. Pure: no clock, no slots, no tensors.

A *plan* is what one forecast (`Schedule`) or one certain order (`Load`) wants for one span at one layer. A
key is wanted while some plan names it. Where the gates have spoken (`progress`), forecasts are void, and late if they
come then. All that a step takes goes through the model together, layer by layer, so this is the order of its experts.
"""

import heapq
from collections.abc import Collection, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from odmoe_node.events import ExpertKey
from odmoe_node.progress import Block, Progress, last_of
from odmoe_node.recent import Recent
from odmoe_wire.messages import Span

MAX_REMEMBERED_SEQUENCES = 4096


class Kind(IntEnum):
    """Sure before maybe: the order in which loads start."""

    CERTAIN = 0
    FORECAST = 1


Rank = tuple[Kind, int, int]
"""(kind, number of the step, layer): smaller is needed earlier."""


@dataclass(slots=True, eq=False)
class Plan:
    """Experts wanted for positions `first`..`last` of a sequence at a layer, `due` when `Progress` says."""

    kind: Kind
    sequence: int
    first: int
    last: int
    layer: int
    due: tuple[int, int]
    experts: set[int] = field(default_factory=set)

    @property
    def rank(self) -> Rank:
        return (self.kind, self.due[0], self.layer)

    @property
    def turn(self) -> tuple[Rank, int]:
        """Its rank; among equals, what is certain to be computed goes before what may be."""
        return self.rank, self.due[1]


PlanId = tuple[Kind, int, int]  # kind, first position, layer; within a sequence
Entry = tuple[tuple[Rank, int], int, int, Plan]  # turn, expert, tie breaker, plan


class WantBook:
    """All plans of a node, at most `max_wants` (plan, expert) pairs."""

    def __init__(self, *, max_wants: int = 16384) -> None:
        self._max_wants = max_wants
        self._num_wants = 0
        self._plans: dict[int, dict[PlanId, Plan]] = {}
        self._by_key: dict[ExpertKey, list[Plan]] = {}
        self._queue: list[Entry] = []
        self._tie = 0
        self._progress = Progress()
        self._ended: Recent[int, None] = Recent(MAX_REMEMBERED_SEQUENCES)

    # ---------------------------------------------------------------------------------------------- questions

    def __len__(self) -> int:
        return self._num_wants

    def wanted(self, key: ExpertKey) -> bool:
        return key in self._by_key

    def rank(self, key: ExpertKey) -> Rank:
        """The earliest rank of a wanted key."""
        return min(plan.rank for plan in self._by_key[key])

    def is_late(self, span: Span, layer: int) -> bool:
        """Whether a forecast comes too late: the sequence is over, or its gates have spoken for this
        layer."""
        return self._progress.is_past(span, layer) or span.sequence in self._ended

    def first(self, *, resident: Container[ExpertKey]) -> ExpertKey | None:
        """The key needed earliest among those wanted and not `resident`."""
        while self._queue:
            _, expert, _, plan = self._queue[0]
            key = ExpertKey(plan.layer, expert)
            if self._is_live(plan, expert) and key not in resident:
                return key
            heapq.heappop(self._queue)
        return None

    # ------------------------------------------------------------------------------------------------ changes

    def add_forecast(self, span: Span, layer: int, experts: Iterable[int]) -> list[ExpertKey] | None:
        """Note a forecast; it replaces an earlier one for the same span and layer (the shadow ran again
        after a rollback). Returns the keys nobody wants any more because of that; None if the book is
        full."""
        experts = set(experts)
        if self._num_wants + len(experts) > self._max_wants:
            return None
        plan = self._plan(Kind.FORECAST, span, layer)
        self._extend(plan, experts)
        return self._shrink(plan, plan.experts - experts)

    def add_certain(self, span: Span, layer: int, experts: Iterable[int]) -> bool:
        """Note experts that are sure to be needed, beside those already noted. False if the book is full."""
        experts = set(experts)
        if self._num_wants + len(experts) > self._max_wants:
            return False
        self._extend(self._plan(Kind.CERTAIN, span, layer), experts)
        return True

    def pass_by(
        self, spans: Sequence[Span], layer: int, *, needed: Collection[int], all_of_layer: bool
    ) -> list[ExpertKey]:
        """The gates of a step have spoken for its spans at the layer; `needed` experts are taken over by a compute.

        Forecasts at or before that are void. Certain wants go when the layer is behind, when they are needed
        now, or with `all_of_layer` (the server released this layer). Returns the keys no plan wants any more.
        """
        step = self._progress.step
        passed = self._progress.pass_by(spans, layer)
        orphans: list[ExpertKey] = []
        for sequence, block in passed.items():
            for plan in list(self._plans.get(sequence, {}).values()):
                orphans += self._shrink(plan, _void_experts(plan, block, needed, all_of_layer))
        if self._progress.step != step:
            self._reorder()
        return orphans

    def roll_back(self, sequence: int, position: int) -> list[ExpertKey]:
        """All forecasts of the sequence that begin at `position` or later are void; those that come after this are
        new. Returns the keys no plan wants any more."""
        orphans: list[ExpertKey] = []
        for plan in list(self._plans.get(sequence, {}).values()):
            if plan.kind is Kind.FORECAST and plan.first >= position:
                orphans += self._shrink(plan, plan.experts)
        self._progress.roll_back(sequence, position)
        return orphans

    def end(self, sequence: int) -> list[ExpertKey]:
        """The sequence is over; later forecasts for it are late. Returns the keys no plan wants any more."""
        self._ended.put(sequence, None)
        self._progress.forget(sequence)
        orphans: list[ExpertKey] = []
        for plan in list(self._plans.get(sequence, {}).values()):
            orphans += self._shrink(plan, plan.experts)
        return orphans

    def drop(self, key: ExpertKey) -> None:
        """Nobody shall want the key any more (it cannot be loaded)."""
        for plan in list(self._by_key.get(key, ())):
            self._shrink(plan, {key.expert})

    def requeue(self, key: ExpertKey) -> None:
        """A wanted key lost its slot: it must be found by `first` again."""
        for plan in self._by_key.get(key, ()):
            self._push(plan, key.expert)

    def clear(self) -> None:
        """Forget all, ended sequences too: another server counts its sequences anew."""
        self._num_wants = 0
        for memory in (self._plans, self._by_key, self._queue, self._progress, self._ended):
            memory.clear()

    def check_integrity(self) -> None:
        """Assert that both indices tell the same, and that nothing waits in a place that is not its own."""
        pairs = {
            (id(plan), expert) for plans in self._plans.values() for plan in plans.values() for expert in plan.experts
        }
        mirrored = {(id(plan), key.expert) for key, plans in self._by_key.items() for plan in plans}
        assert pairs == mirrored
        assert len(pairs) == self._num_wants == sum(map(len, self._by_key.values()))
        assert self._num_wants <= self._max_wants
        assert all(plan.experts for plans in self._plans.values() for plan in plans.values())
        assert all(self._plans.values())
        assert all(turn == plan.turn for turn, expert, _, plan in self._queue if self._is_live(plan, expert))

    # ---------------------------------------------------------------------------------------------- internals

    def _is_live(self, plan: Plan, expert: int) -> bool:
        return expert in plan.experts

    def _plan(self, kind: Kind, span: Span, layer: int) -> Plan:
        plans = self._plans.setdefault(span.sequence, {})
        plan = plans.get((kind, span.position, layer))
        if plan is None:
            due = self._progress.due(span.sequence, span.position)
            plan = Plan(kind, span.sequence, span.position, last_of(span), layer, due)
            plans[kind, span.position, layer] = plan
        plan.last = max(plan.last, last_of(span))
        return plan

    def _all(self) -> Iterator[Plan]:
        for plans in self._plans.values():
            yield from plans.values()

    def _reorder(self) -> None:
        """Another step has begun; where it is not the one that was expected, experts are due at other times."""
        moved = False
        for plan in self._all():
            due = self._progress.due(plan.sequence, plan.first)
            moved = moved or due != plan.due
            plan.due = due
        if moved:
            self._queue.clear()
            for plan in self._all():
                for expert in plan.experts:
                    self._push(plan, expert)

    def _extend(self, plan: Plan, experts: set[int]) -> None:
        for expert in experts - plan.experts:
            plan.experts.add(expert)
            self._by_key.setdefault(ExpertKey(plan.layer, expert), []).append(plan)
            self._num_wants += 1
            self._push(plan, expert)
        if not plan.experts:
            self._discard(plan)

    def _shrink(self, plan: Plan, experts: Collection[int]) -> list[ExpertKey]:
        """Take experts out of a plan; returns the keys that no plan wants any more."""
        orphans = []
        for expert in list(experts):
            key = ExpertKey(plan.layer, expert)
            plan.experts.remove(expert)
            self._num_wants -= 1
            self._by_key[key].remove(plan)
            if not self._by_key[key]:
                del self._by_key[key]
                orphans.append(key)
        if not plan.experts:
            self._discard(plan)
        return orphans

    def _discard(self, plan: Plan) -> None:
        plans = self._plans.get(plan.sequence, {})
        plans.pop((plan.kind, plan.first, plan.layer), None)
        if not plans:
            self._plans.pop(plan.sequence, None)

    def _push(self, plan: Plan, expert: int) -> None:
        self._tie += 1
        heapq.heappush(self._queue, (plan.turn, expert, self._tie, plan))
        if len(self._queue) > 64 + 4 * self._num_wants:
            self._queue = [entry for entry in self._queue if self._is_live(entry[3], entry[1])]
            heapq.heapify(self._queue)


def _void_experts(plan: Plan, passed: Block, needed: Collection[int], all_of_layer: bool) -> Collection[int]:
    """The experts a plan no longer wants once the gates have `passed`."""
    covered = plan.layer == passed.layer and plan.last <= passed.last
    if plan.kind is Kind.FORECAST:
        return plan.experts if passed.is_past(last=plan.last, layer=plan.layer) else ()
    behind = plan.layer < passed.layer and plan.first <= passed.last
    outrun = plan.layer == passed.layer and plan.last < passed.first
    if behind or outrun or (covered and all_of_layer):
        return plan.experts
    return plan.experts.intersection(needed) if covered else ()
