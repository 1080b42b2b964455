"""Which experts are wanted, by whom, and which of them is needed first. Pure: no clock, no slots, no tensors.

A *plan* is what one forecast (`Schedule`) or one certain order (`Load`) wants for one span at one layer. A
key is wanted while some plan names it. The *horizon* of a sequence is how far the server's gates have
spoken: forecasts at or before it are void, those that arrive later than it are late.
"""

import heapq
from collections.abc import Collection, Container, Iterable
from dataclasses import dataclass, field
from enum import IntEnum

from odmoe_node.events import ExpertKey
from odmoe_node.recent import Recent
from odmoe_wire.messages import Span

MAX_REMEMBERED_SEQUENCES = 4096


class Kind(IntEnum):
    """Sure before maybe: the order in which loads start."""

    CERTAIN = 0
    FORECAST = 1


Rank = tuple[Kind, int, int]
"""(kind, when the span was first heard of, layer): smaller is needed earlier."""


@dataclass(slots=True, eq=False)
class Plan:
    """Experts wanted for positions `first`..`last` of a sequence at a layer."""

    kind: Kind
    sequence: int
    first: int
    last: int
    layer: int
    order: int
    experts: set[int] = field(default_factory=set)

    @property
    def rank(self) -> Rank:
        return (self.kind, self.order, self.layer)


@dataclass(frozen=True, slots=True)
class Horizon:
    """The gates have spoken for all before `first`, and for `first`..`last` up to and with `layer`."""

    first: int
    last: int
    layer: int

    def is_past(self, *, last: int, layer: int) -> bool:
        return last < self.first or (last <= self.last and layer <= self.layer)


PlanId = tuple[Kind, int, int]  # kind, first position, layer; within a sequence


class WantBook:
    """All plans of a node, at most `max_wants` (plan, expert) pairs."""

    def __init__(self, *, max_wants: int = 16384) -> None:
        self._max_wants = max_wants
        self._num_wants = 0
        self._plans: dict[int, dict[PlanId, Plan]] = {}
        self._by_key: dict[ExpertKey, list[Plan]] = {}
        self._queue: list[tuple[Rank, int, int, Plan]] = []  # rank, expert, tie breaker, plan
        self._tie = 0
        self._next_order = 0
        self._span_order: dict[int, dict[int, int]] = {}  # sequence -> first position -> order
        self._horizons: Recent[int, Horizon] = Recent(MAX_REMEMBERED_SEQUENCES)
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
        horizon = self._horizons.get(span.sequence)
        late = horizon is not None and horizon.is_past(last=_last(span), layer=layer)
        return late or span.sequence in self._ended

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

    def pass_by(self, span: Span, layer: int, *, needed: Collection[int], all_of_layer: bool) -> list[ExpertKey]:
        """The gates have spoken for the span at the layer; `needed` experts are taken over by a compute.

        Forecasts at or before that are void. Certain wants go when the layer is behind, when they are needed
        now, or with `all_of_layer` (the server released this layer). Returns the keys no plan wants any more.
        """
        passed = Horizon(span.position, _last(span), layer)
        self._move_horizon(span.sequence, passed)
        orphans: list[ExpertKey] = []
        for plan in list(self._plans.get(span.sequence, {}).values()):
            orphans += self._shrink(plan, _void_experts(plan, passed, needed, all_of_layer))
        self._prune_span_order(span.sequence)
        return orphans

    def roll_back(self, sequence: int, position: int) -> list[ExpertKey]:
        """All forecasts of the sequence that begin at `position` or later are void; those that come after this are
        new. Returns the keys no plan wants any more."""
        orphans: list[ExpertKey] = []
        for plan in list(self._plans.get(sequence, {}).values()):
            if plan.kind is Kind.FORECAST and plan.first >= position:
                orphans += self._shrink(plan, plan.experts)
        return orphans

    def end(self, sequence: int) -> list[ExpertKey]:
        """The sequence is over; later forecasts for it are late. Returns the keys no plan wants any more."""
        self._ended.put(sequence, None)
        self._horizons.discard(sequence)
        orphans: list[ExpertKey] = []
        for plan in list(self._plans.get(sequence, {}).values()):
            orphans += self._shrink(plan, plan.experts)
        self._span_order.pop(sequence, None)
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
        """Forget all, horizons and ended sequences too: another server counts its sequences anew."""
        self._num_wants = 0
        for memory in (self._plans, self._by_key, self._queue, self._span_order, self._horizons, self._ended):
            memory.clear()

    def check_integrity(self) -> None:
        """Assert that both indices tell the same."""
        pairs = {
            (id(plan), expert) for plans in self._plans.values() for plan in plans.values() for expert in plan.experts
        }
        mirrored = {(id(plan), key.expert) for key, plans in self._by_key.items() for plan in plans}
        assert pairs == mirrored
        assert len(pairs) == self._num_wants == sum(map(len, self._by_key.values()))
        assert self._num_wants <= self._max_wants
        assert all(plan.experts for plans in self._plans.values() for plan in plans.values())
        assert all(self._plans.values())

    # ---------------------------------------------------------------------------------------------- internals

    def _is_live(self, plan: Plan, expert: int) -> bool:
        return expert in plan.experts

    def _plan(self, kind: Kind, span: Span, layer: int) -> Plan:
        plans = self._plans.setdefault(span.sequence, {})
        plan = plans.get((kind, span.position, layer))
        if plan is None:
            plan = Plan(kind, span.sequence, span.position, _last(span), layer, self._order_of(span))
            plans[kind, span.position, layer] = plan
        plan.last = max(plan.last, _last(span))
        return plan

    def _order_of(self, span: Span) -> int:
        orders = self._span_order.setdefault(span.sequence, {})
        if span.position not in orders:
            orders[span.position] = self._next_order
            self._next_order += 1
        return orders[span.position]

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
        heapq.heappush(self._queue, (plan.rank, expert, self._tie, plan))
        if len(self._queue) > 64 + 4 * self._num_wants:
            self._queue = [entry for entry in self._queue if self._is_live(entry[3], entry[1])]
            heapq.heapify(self._queue)

    def _move_horizon(self, sequence: int, passed: Horizon) -> None:
        before = self._horizons.get(sequence)
        if before is not None and passed.first < before.first:
            return
        if before is not None and passed.first == before.first:
            passed = Horizon(passed.first, max(before.last, passed.last), max(before.layer, passed.layer))
        self._horizons.put(sequence, passed)

    def _prune_span_order(self, sequence: int) -> None:
        orders, horizon = self._span_order.get(sequence), self._horizons.get(sequence)
        if orders is None or horizon is None:
            return
        planned = {plan.first for plan in self._plans.get(sequence, {}).values()}
        for position in [p for p in orders if p < horizon.first and p not in planned]:
            del orders[position]
        if not orders:
            del self._span_order[sequence]


def _last(span: Span) -> int:
    return span.position + max(span.length, 1) - 1


def _void_experts(plan: Plan, passed: Horizon, needed: Collection[int], all_of_layer: bool) -> Collection[int]:
    """The experts a plan no longer wants once the gates have `passed`."""
    covered = plan.layer == passed.layer and plan.last <= passed.last
    if plan.kind is Kind.FORECAST:
        return plan.experts if passed.is_past(last=plan.last, layer=plan.layer) else ()
    behind = plan.layer < passed.layer and plan.first <= passed.last
    outrun = plan.layer == passed.layer and plan.last < passed.first
    if behind or outrun or (covered and all_of_layer):
        return plan.experts
    return plan.experts.intersection(needed) if covered else ()
