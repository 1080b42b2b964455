"""What a node does, decided: events in, actions out. Pure: no socket, clock, thread, tensor or file.

The rules (design, section 7): slots are filled in the order in which experts are needed; an expert in a slot
is used as it is, one that is loading is waited for, one that is missing is loaded at once ahead of all
forecasts; an expert that nobody wants any more leaves its slot at once.
"""

from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal, assert_never

from odmoe_node.events import (
    Action,
    Answer,
    ComputeBroke,
    ComputeDone,
    Event,
    ExpertKey,
    Forget,
    LoadBroke,
    LoadDone,
    ServerLost,
    StartCompute,
    StartLoad,
    Tell,
    Tick,
    Told,
)
from odmoe_node.requests import Outcome, Request, RequestBook
from odmoe_node.slots import FREE, Computing, Free, Loading, Ready, Slot, SlotTable
from odmoe_node.wants import Rank, WantBook
from odmoe_wire.messages import (
    Cancel,
    Compute,
    ComputeFailed,
    Load,
    Loaded,
    LoadFailed,
    Release,
    Schedule,
    Span,
    View,
    Welcome,
)

FailureCode = Literal["load_failed", "expired", "bad_request"]
STORY_LENGTH = 512
PATIENCE = 8
"""How many computes of younger requests may go before an older one that waits for a slot."""


@dataclass(slots=True)
class Counters:
    """What happened since the start; these only grow."""

    loads: int = 0
    loads_failed: int = 0
    loads_cancelled: int = 0  # wants that ended before their load began: free of cost
    loads_unused: int = 0  # loads whose expert left its slot without having been computed
    load_s: float = 0.0
    compute_s: float = 0.0
    stale: int = 0  # messages of a former view or incarnation
    late_forecasts: int = 0
    overflowed: int = 0  # forecasts and loads there was no room to note
    duplicates: int = 0
    expired: int = 0


class NodeState:
    """The node's slots, wants and computes. `handle` is the only way in; `max_loading` loads run at a
    time."""

    def __init__(self, *, num_slots: int, slot_bytes: int, max_loading: int = 1) -> None:
        if num_slots < 1:
            raise ValueError(f"a node needs at least one slot, not {num_slots}")
        self.counters = Counters()
        self.story: deque[tuple[float, str, object]] = deque(maxlen=STORY_LENGTH)
        self._slots = SlotTable(num_slots)
        self._wants = WantBook()
        self._requests = RequestBook()
        self._slot_bytes = slot_bytes
        self._max_loading = max_loading
        self._welcomed = False
        self._first_epoch: int | None = None  # of the first view after the welcome; none before it
        self._epoch = 0
        self._actions: list[Action] = []
        self._news: list[Tell] = []  # what the server may hear after everything urgent was done

    # ---------------------------------------------------------------------------------------------- questions

    @property
    def epoch(self) -> int:
        """Of the latest view; 0 before the first."""
        return self._epoch

    @property
    def used_slots(self) -> int:
        return self._slots.num_used

    @property
    def accounted_bytes(self) -> int:
        return self._slots.num_used * self._slot_bytes

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    @property
    def num_wants(self) -> int:
        return len(self._wants)

    def in_hand(self, request_id: int) -> bool:
        """Whether the request was taken in and has not ended."""
        return self._requests.get(request_id) is not None

    def slot(self, number: int) -> Slot:
        return self._slots[number]

    def next_deadline_s(self) -> float | None:
        """When the next request expires if nothing else happens."""
        return self._requests.next_deadline_s()

    # ------------------------------------------------------------------------------------------------- events

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take in one event; returns what is to be done, in this order."""
        self._actions, self._news = [], []
        self._note(now, "event", event)
        match event:
            case Told():
                self._on_told(event, now)
            case LoadDone():
                self._on_load_done(event)
            case LoadBroke():
                self._on_load_broke(event)
            case ComputeDone():
                self._on_compute_done(event)
            case ComputeBroke():
                self._on_compute_broke(event)
            case ServerLost():
                self._reset()
            case Tick():
                pass
            case _:
                assert_never(event)
        self._settle(now)
        self._actions += self._news
        for action in self._actions:
            self._note(now, "action", action)
        return self._actions

    def _on_told(self, told: Told, now: float) -> None:
        match told.message:
            case Welcome():
                self._welcomed = True
            case View():
                self._on_view(told.epoch)
            case Schedule() | Load() as message:
                self._on_order_ahead(message, told.epoch)
            case Compute() as message:
                self._on_compute(message, told.epoch, now)
            case Release(spans=spans, layer=layer):
                self._pass_by(spans, layer, needed=(), all_of_layer=True)
            case Cancel(sequence=sequence):
                self._on_cancel(sequence)
            case _:
                assert_never(told.message)

    def _on_view(self, epoch: int) -> None:
        if not self._welcomed:
            self.counters.stale += 1
            return
        if epoch < self._epoch:  # epochs only grow: this is another server, it knows nothing of our work
            self._reset()
            self._welcomed = True
        self._epoch = epoch
        if self._first_epoch is None:
            self._first_epoch = epoch

    def _on_order_ahead(self, message: Schedule | Load, epoch: int) -> None:
        if self._first_epoch is None or epoch < self._epoch:
            self.counters.stale += 1
        elif isinstance(message, Schedule):
            self._on_schedule(message)
        else:
            self._on_load(message)

    def _on_schedule(self, message: Schedule) -> None:
        if self._wants.is_late(message.span, message.layer):
            self.counters.late_forecasts += 1
            return
        orphans = self._wants.add_forecast(message.span, message.layer, message.experts)
        if orphans is None:
            self.counters.overflowed += 1
        else:
            self._count_cancelled(orphans)

    def _on_load(self, message: Load) -> None:
        for span in message.spans:
            if not self._wants.add_certain(span, message.layer, message.experts):
                self.counters.overflowed += 1

    def _on_compute(self, message: Compute, epoch: int, now: float) -> None:
        if self._first_epoch is None or epoch < self._first_epoch:
            self.counters.stale += 1
            return
        if self._requests.seen(message.request_id):
            self.counters.duplicates += 1
            return
        keys = [ExpertKey(message.layer, expert) for expert in message.experts]
        foreseen = frozenset(key.expert for key in keys if self._wants.wanted(key))
        self._requests.open(message, now, {key.expert: self._outcome(key) for key in keys}, foreseen)
        self._pass_by(message.spans, message.layer, needed=message.experts, all_of_layer=False)

    def _outcome(self, key: ExpertKey) -> Outcome:
        match self._slots.find(key):
            case None | Free():
                return "miss"
            case Loading():
                return "late"
            case Ready() | Computing():
                return "hit"

    def _on_cancel(self, sequence: int) -> None:
        self._count_cancelled(self._wants.end(sequence))
        for request in self._requests.all():
            request.sequences.discard(sequence)
            if not request.sequences:
                self._requests.close(request)
                self._actions.append(Forget(request.request_id))

    def _on_load_done(self, event: LoadDone) -> None:
        state = self._slots[event.slot]
        assert isinstance(state, Loading), f"slot {event.slot} was not loading: {state}"
        self.counters.loads += 1
        self.counters.load_s += event.load_s
        self._slots.put(event.slot, Ready(state.key))
        if self._is_wanted(state.key):
            loaded = Loaded(
                layer=state.key.layer,
                expert=state.key.expert,
                load_s=event.load_s,
                load_bytes=self._slot_bytes,
                on_demand=state.on_demand,
            )
            self._news.append(Tell(loaded))

    def _on_load_broke(self, event: LoadBroke) -> None:
        state = self._slots[event.slot]
        assert isinstance(state, Loading), f"slot {event.slot} was not loading: {state}"
        key, reason = state.key, event.reason
        self.counters.loads_failed += 1
        self._slots.put(event.slot, FREE)
        self._wants.drop(key)
        self._news.append(Tell(LoadFailed(layer=key.layer, expert=key.expert, reason=reason)))
        for request in self._requests.all():
            if request.message.layer == key.layer and key.expert in request.waiting():
                self._requests.close(request)
                self._fail(request.request_id, "load_failed", f"{_name(key)}: {reason}")

    def _on_compute_done(self, event: ComputeDone) -> None:
        self.counters.compute_s += event.compute_s
        request, key = self._end_computing(event.slot)
        if request is not None and self._requests.finish(request, key.expert, event.compute_s):
            self._requests.close(request)
            self._actions.append(Answer(request.result()))

    def _on_compute_broke(self, event: ComputeBroke) -> None:
        request, key = self._end_computing(event.slot)
        if request is not None:
            self._requests.close(request)
            self._fail(request.request_id, "bad_request", f"{_name(key)}: {event.reason}")

    def _end_computing(self, slot: int) -> tuple[Request | None, ExpertKey]:
        state = self._slots[slot]
        assert isinstance(state, Computing), f"slot {slot} was not computing: {state}"
        self._slots.put(slot, Ready(state.key, used=True))
        request = self._requests.get(state.request_id)
        # The number tells a request from one with the same id that another server sent before it.
        return request if request and request.number == state.number else None, state.key

    # ----------------------------------------------------------------------------------------------- settling

    def _settle(self, now: float) -> None:
        """Do all that can be done now: expire, compute, free, load."""
        self._expire(now)
        for slot in self._slots.occupied():
            self._settle_slot(slot, now)
        while self._slots.num_loading < self._max_loading and self._start_next_load():
            pass

    def _expire(self, now: float) -> None:
        deadline_s = self._requests.next_deadline_s()
        if deadline_s is None or deadline_s > now:
            return
        for request in self._requests.all():
            if request.deadline_s <= now:
                self.counters.expired += 1
                self._requests.close(request)
                waited = f"not done {request.message.ttl_s:.3f} s after it came"
                self._fail(request.request_id, "expired", waited)

    def _settle_slot(self, slot: int, now: float) -> None:
        match self._slots[slot]:
            case Ready(key=key) as state:
                if self._requests.waited_for(key):
                    self._compute_or_yield(slot, key, now)
                elif not self._wants.wanted(key):
                    self._free(slot, state)
            case Loading(key=key, on_demand=on_demand, unwanted=unwanted):
                if unwanted is self._is_wanted(key):
                    self._slots.put(slot, Loading(key, on_demand, not unwanted))
            case Computing() | Free():
                pass

    def _compute_or_yield(self, slot: int, key: ExpertKey, now: float) -> None:
        """Compute for the oldest request that waits for the key, unless an older one has waited too long for
        a slot of its own: then it gets this one."""
        request = self._requests.oldest_waiting(key)
        absent = self._requests.first_absent(self._slots)
        if absent is not None and absent[0].number < request.number:
            older = absent[0]
            older.passed_over += 1
            if older.passed_over > PATIENCE and self._slots.any_free() is None:
                older.passed_over = 0
                self._evict(slot)
                return
        self._requests.start(request, key.expert, now)
        self._slots.put(slot, Computing(key, request.request_id, request.number))
        self._actions.append(StartCompute(slot, key, request.request_id))

    def _start_next_load(self) -> bool:
        """Start the load that is needed first; false when there is none or no slot for it."""
        slot = self._slots.any_free()
        absent = self._requests.first_absent(self._slots)
        if absent is not None:
            request, key = absent
            slot = self._make_room() if slot is None else slot
            on_demand = key.expert not in request.foreseen and not self._wants.wanted(key)
        else:
            wanted = self._wants.first(resident=self._slots)
            if wanted is None:
                return False
            if slot is None:
                slot = self._make_room(before=self._wants.rank(wanted))
            key, on_demand = wanted, False
        if slot is None:
            return False
        self._slots.put(slot, Loading(key, on_demand))
        self._actions.append(StartLoad(slot, key))
        return True

    def _make_room(self, *, before: Rank | None = None) -> int | None:
        """Take the slot of the expert needed last among those no compute waits for; with `before` only if it is
        needed later than that. An expert stays in its slot when a later token wants it too."""
        last: tuple[Rank, int] | None = None
        for slot in self._slots.occupied():
            state = self._slots[slot]
            if isinstance(state, Ready) and not self._requests.waited_for(state.key):
                last = max(last or (self._wants.rank(state.key), slot), (self._wants.rank(state.key), slot))
        if last is None or (before is not None and last[0] <= before):
            return None
        self._evict(last[1])
        return last[1]

    def _evict(self, slot: int) -> None:
        """Take a slot from an expert that is still wanted; it will be loaded again."""
        state = self._slots[slot]
        assert isinstance(state, Ready)
        self._free(slot, state)
        self._wants.requeue(state.key)

    def _free(self, slot: int, state: Ready) -> None:
        self.counters.loads_unused += not state.used
        self._slots.put(slot, FREE)

    # ---------------------------------------------------------------------------------------------- internals

    def _is_wanted(self, key: ExpertKey) -> bool:
        return self._wants.wanted(key) or self._requests.waited_for(key)

    def _pass_by(self, spans: Iterable[Span], layer: int, *, needed: Collection[int], all_of_layer: bool) -> None:
        for span in spans:
            orphans = self._wants.pass_by(span, layer, needed=needed, all_of_layer=all_of_layer)
            self._count_cancelled(orphans)

    def _count_cancelled(self, orphans: Collection[ExpertKey]) -> None:
        """Of the keys no plan wants any more, count those that were never begun."""
        self.counters.loads_cancelled += sum(
            key not in self._slots and not self._requests.waited_for(key) for key in orphans
        )

    def _fail(self, request_id: int, code: FailureCode, reason: str) -> None:
        self._actions.append(Answer(ComputeFailed(request_id=request_id, code=code, reason=reason)))

    def _reset(self) -> None:
        """Forget all work; what is in flight ends in slots that nobody wants."""
        self._actions += [Forget(request.request_id) for request in self._requests.all()]
        self._wants.clear()
        self._requests.clear()
        self._welcomed, self._first_epoch, self._epoch = False, None, 0

    def _note(self, now: float, what: str, item: object) -> None:
        self.story.append((now, what, item))

    def check_integrity(self) -> None:
        """Assert what must hold between any two events."""
        self._slots.check_integrity()
        self._wants.check_integrity()
        self._requests.check_integrity()
        assert self._slots.num_loading <= self._max_loading
        for slot, state in self._slots:
            match state:
                case Ready(key=key):
                    assert self._wants.wanted(key), f"slot {slot} holds {key}, which nobody wants"
                    assert not self._requests.waited_for(key), f"slot {slot}: {key} waits to be computed"
                case Loading(key=key, unwanted=unwanted):
                    assert unwanted is not self._is_wanted(key)
                case Free() | Computing():
                    pass
        loader_idle = self._slots.num_loading == 0
        if loader_idle and self._slots.any_free() is not None:
            assert self._requests.first_absent(self._slots) is None, "a need waits beside a free slot"
            assert self._wants.first(resident=self._slots) is None, "a forecast waits beside a free slot"


def _name(key: ExpertKey) -> str:
    return f"layer {key.layer} expert {key.expert}"
