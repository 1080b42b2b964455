"""What a node does, decided: events in, actions out. Pure: no socket, clock, thread, tensor or file.

The rules (design, section 7): slots are filled in the order in which experts are needed; an expert in a slot
is used as it is, one that is loading is waited for (or computed as it arrives, if the bank can), one that is missing is
loaded at once ahead of all forecasts; an expert that nobody wants any more leaves its slot at once, or, in modes
"lru" and "importance", when room is needed.
"""

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Literal, assert_never

from odmoe_node.counters import Counters
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
    LoadStopped,
    Mention,
    ServerLost,
    StartCompute,
    Tell,
    Tick,
    Told,
)
from odmoe_node.eviction import leaving_in_turn
from odmoe_node.loader import Loader
from odmoe_node.pace import Pace
from odmoe_node.requests import Outcome, Request, RequestBook
from odmoe_node.slots import FREE, Computing, Free, Loading, Ready, Resting, Riding, Slot, SlotTable
from odmoe_node.wants import WantBook
from odmoe_wire.messages import (
    Cancel,
    Compute,
    ComputeFailed,
    ExpertRef,
    Load,
    Loaded,
    LoadFailed,
    Release,
    Rollback,
    Schedule,
    SlotMode,
    Span,
    View,
    Welcome,
    Withdraw,
)

FailureCode = Literal["load_failed", "expired", "bad_request"]
STORY_LENGTH = 512
BRIEF_S = 0.05
"""A compute that takes no longer may hold up the life signs, of which there is one a second."""
PATIENCE = 8
"""How many computes of younger requests may go before an older one that waits for a slot."""


class NodeState:
    """The node's slots, wants and computes. `handle` is the only way in; `max_loading` loads run at a
    time. `on_arrival`: an expert can be computed while its load is under way."""

    def __init__(self, *, num_slots: int, slot_bytes: int, max_loading: int = 1, on_arrival: bool = False) -> None:
        if num_slots < 1:
            raise ValueError(f"a node needs at least one slot, not {num_slots}")
        self.counters = Counters()
        self.story: deque[tuple[float, str, object]] = deque(maxlen=STORY_LENGTH)
        self._slots = SlotTable(num_slots)
        self._wants = WantBook()
        self._requests = RequestBook()
        self._loader = Loader(
            self._slots,
            wants=self._wants,
            requests=self._requests,
            counters=self.counters,
            max_loading=max_loading,
        )
        self._pace = Pace()
        self._slot_bytes = slot_bytes
        self._on_arrival = on_arrival
        self._mode: SlotMode = "on-demand"
        self._welcomed = False
        self._first_epoch: int | None = None  # of the first view after the welcome; none before it
        self._epoch = 0
        self._actions: list[Action] = []
        self._answers: list[Answer] = []  # after what starts loads and computes, which takes less time to say
        self._news: list[Tell | Mention] = []  # what the server may hear after everything urgent was done

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

    def is_brief(self, order: StartCompute, *, wait_s: float | None = None) -> bool:
        """Whether a compute just ordered may be done on the spot: it is short, and with one slot nothing could begin
        before its end anyway. One on arrival waits `wait_s`, if that is known."""
        request = self._requests.get(order.request_id)
        if request is None or len(self._slots) > 1 or (order.on_arrival and wait_s is None):
            return False
        return (wait_s or 0.0) + self._pace.at_most_s(request.runs(order.key.expert)) <= BRIEF_S

    @property
    def awaits_load(self) -> bool:
        """Whether anything could begin if a load ended now."""
        return self._loader.is_awaited()

    @property
    def tells_held(self) -> bool:
        """Whether the server wants to know at all times what is in the slots."""
        return self._mode == "importance"

    def held(self) -> list[ExpertRef]:
        """What the server is told of the slots: the experts that lie whole in them; nothing if it need not know."""
        return [ExpertRef(*key) for key in self._slots.whole()] if self.tells_held else []

    def slot(self, number: int) -> Slot:
        return self._slots[number]

    def next_deadline_s(self) -> float | None:
        """When the next request expires if nothing else happens."""
        return self._requests.next_deadline_s()

    # ------------------------------------------------------------------------------------------------- events

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take in one event; returns what is to be done, in this order."""
        self._actions, self._answers, self._news = [], [], []
        self._note(now, "event", event)
        match event:
            case Told():
                self._on_told(event, now)
            case LoadDone():
                self._on_load_done(event, now)
            case LoadBroke():
                self._on_load_broke(event)
            case LoadStopped(slot=slot, load_s=load_s):
                self._loader.stopped(slot, load_s)
            case ComputeDone():
                self._on_compute_done(event, now)
            case ComputeBroke():
                self._on_compute_broke(event, now)
            case ServerLost():
                self._reset()
            case Tick():
                pass
            case _:
                assert_never(event)
        self._settle(now)
        self._actions += self._answers
        self._actions += self._news
        for action in self._actions:
            self._note(now, "action", action)
        return self._actions

    def _on_told(self, told: Told, now: float) -> None:
        match told.message:
            case Welcome():
                self._welcomed = True
            case View(mode=mode):
                self._on_view(mode, told.epoch)
            case Schedule() | Rollback() | Load() as message:
                self._on_order_ahead(message, told.epoch)
            case Compute() as message:
                self._on_compute(message, told.epoch, now)
            case Release(spans=spans, layer=layer):
                self._pass_by(spans, layer, needed=(), all_of_layer=True)
            case Cancel(sequence=sequence):
                self._on_cancel(sequence)
            case Withdraw(request_id=request_id):
                if (request := self._requests.get(request_id)) is not None:
                    self._give_up(request)
            case _:
                assert_never(told.message)

    def _on_view(self, mode: SlotMode, epoch: int) -> None:
        if not self._welcomed:
            self.counters.stale += 1
            return
        if epoch < self._epoch:  # epochs only grow: this is another server, it knows nothing of our work
            self._reset()
            self._welcomed = True
        self._epoch, self._mode = epoch, mode
        if self._first_epoch is None:
            self._first_epoch = epoch

    def _on_order_ahead(self, message: Schedule | Rollback | Load, epoch: int) -> None:
        if self._first_epoch is None or epoch < self._epoch:
            self.counters.stale += 1
            return
        match message:
            case Schedule():
                self._on_schedule(message)
            case Rollback(sequence=sequence, position=position):
                self._count_cancelled(self._wants.roll_back(sequence, position))
            case Load():
                self._on_load(message)
            case _:
                assert_never(message)

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
        if message.leaving:
            self._loader.leaving = leaving_in_turn(message.leaving)
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
        if message.leaving:
            self._loader.leaving = leaving_in_turn(message.leaving)
        keys = [ExpertKey(message.layer, expert) for expert in message.experts]
        foreseen = frozenset(key.expert for key in keys if self._wants.wanted(key))
        reused = frozenset(key.expert for key in keys if self._slots.was_used(key))
        self._requests.open(message, now, {key.expert: self._outcome(key) for key in keys}, foreseen, reused=reused)
        self._pass_by(message.spans, message.layer, needed=message.experts, all_of_layer=False)

    def _outcome(self, key: ExpertKey) -> Outcome:
        match self._slots.find(key):
            case None | Free():
                return "miss"
            case Loading(stopping=stopping):
                return "miss" if stopping else "late"
            case Riding():
                return "late"
            case Ready() | Resting() | Computing():
                return "hit"

    def _on_cancel(self, sequence: int) -> None:
        self._count_cancelled(self._wants.end(sequence))
        for request in self._requests.all():
            request.sequences.discard(sequence)
            if not request.sequences:
                self._give_up(request)

    def _give_up(self, request: Request) -> None:
        """Nobody waits for its answer; what is computed of it now is computed to its end."""
        self._requests.close(request)
        self._actions.append(Forget(request.request_id))

    def _on_load_done(self, event: LoadDone, now: float) -> None:
        state = self._slots[event.slot]
        assert isinstance(state, Loading | Riding), f"slot {event.slot} was not loading: {state}"
        self._loader.loaded(event.load_s)
        if isinstance(state, Riding):
            self._slots.put(event.slot, Computing(state.key, state.request_id, state.number))
        else:
            self._slots.put(event.slot, Ready(state.key, used=state.used, used_s=now))
        if isinstance(state, Riding) or self._is_wanted(state.key) or self.tells_held:
            loaded = Loaded(
                layer=state.key.layer,
                expert=state.key.expert,
                load_s=event.load_s,
                load_bytes=self._slot_bytes,
                on_demand=state.on_demand,
            )
            self._news.append(Mention(loaded, event.ended_s))

    def _on_load_broke(self, event: LoadBroke) -> None:
        state = self._slots[event.slot]
        assert isinstance(state, Loading | Riding), f"slot {event.slot} was not loading: {state}"
        key, reason = state.key, event.reason
        self.counters.loads_failed += 1
        rider: int | None = None
        if isinstance(state, Riding):  # its compute will end too, and finds nobody who waits for it
            rider = state.number
            self._slots.put(event.slot, Computing(key, state.request_id, state.number, is_whole=False))
        else:
            self._slots.put(event.slot, FREE)
        self._wants.drop(key)
        self._news.append(Tell(LoadFailed(layer=key.layer, expert=key.expert, reason=reason)))
        for request in self._requests.all():
            waits = request.message.layer == key.layer and key.expert in request.waiting()
            if waits or request.number == rider:
                self._requests.close(request)
                self._fail(request.request_id, "load_failed", f"{_name(key)}: {reason}")

    def _on_compute_done(self, event: ComputeDone, now: float) -> None:
        self.counters.compute_s += event.compute_s
        request, key = self._end_computing(event.slot, now)
        if request is None:
            return
        self._pace.took(request.runs(key.expert), event.compute_s)
        if self._requests.finish(request, key.expert, event.compute_s, waited_s=event.waited_s):
            self._requests.close(request)
            self._answers.append(Answer(request.result()))

    def _on_compute_broke(self, event: ComputeBroke, now: float) -> None:
        was_riding = isinstance(self._slots[event.slot], Riding)
        request, key = self._end_computing(event.slot, now)
        if request is None:
            return
        if was_riding:  # if the load broke, its end will say so; else the expert is computed after it
            self._requests.take_back(request, key.expert)
            return
        self._requests.close(request)
        self._fail(request.request_id, "bad_request", f"{_name(key)}: {event.reason}")

    def _end_computing(self, slot: int, now: float) -> tuple[Request | None, ExpertKey]:
        state = self._slots[slot]
        assert isinstance(state, Computing | Riding), f"slot {slot} was not computing: {state}"
        if isinstance(state, Riding):
            self._slots.put(slot, Loading(state.key, state.on_demand, state.began_s, used=True))
        elif state.is_whole:
            self._slots.put(slot, Ready(state.key, used=True, used_s=now))
        else:
            self._slots.put(slot, FREE)
            self._wants.requeue(state.key)  # wanted by someone who came after the load had failed
        request = self._requests.get(state.request_id)
        # The number tells a request from one with the same id that another server sent before it.
        return request if request and request.number == state.number else None, state.key

    # ----------------------------------------------------------------------------------------------- settling

    def _settle(self, now: float) -> None:
        """Do all that can be done now: expire, compute, free, load."""
        self._expire(now)
        for slot in self._slots.occupied():
            self._settle_slot(slot, now)
        self._actions += self._loader.settle(now)
        if self._on_arrival:
            self._ride(now)

    def _ride(self, now: float) -> None:
        """Compute what is waited for as it arrives, for the oldest request that waits for it."""
        for slot, state in self._slots.loading().items():
            if state.stopping or state.used or not self._requests.waited_for(state.key):
                continue
            request = self._requests.oldest_waiting(state.key)
            if self._overdue(request) is not None:
                continue  # it gets this slot when the load is over
            self._requests.start(request, state.key.expert, now)
            number = request.number
            self._slots.put(slot, Riding(state.key, state.on_demand, state.began_s, request.request_id, number))
            self._actions.append(StartCompute(slot, state.key, request.request_id, on_arrival=True))

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
            case Ready() | Resting() as state:
                self._settle_held(slot, state, now)
            case Loading(key=key, unwanted=unwanted) as state:
                if unwanted is self._is_wanted(key):
                    self._slots.put(slot, replace(state, unwanted=not unwanted))
            case Computing() | Riding() | Free():
                pass

    def _settle_held(self, slot: int, state: Ready | Resting, now: float) -> None:
        """An expert in a slot is computed if that can be, kept if it is wanted, and else rests there or goes."""
        if self._requests.waited_for(state.key):
            self._compute_or_yield(slot, state.key, now)
        elif self._wants.wanted(state.key):
            if isinstance(state, Resting):
                self._slots.put(slot, Ready(state.key, state.used, state.used_s))
        elif self._mode == "on-demand":
            self._loader.free(slot)
        elif isinstance(state, Ready):
            self._slots.put(slot, Resting(state.key, state.used, state.used_s))

    def _compute_or_yield(self, slot: int, key: ExpertKey, now: float) -> None:
        """Compute for the oldest request that waits for the key, unless an older one has waited too long for
        a slot of its own: then it gets this one."""
        request = self._requests.oldest_waiting(key)
        if (older := self._overdue(request)) is not None:
            older.passed_over = 0
            self._loader.free(slot)
            return
        self._requests.start(request, key.expert, now)
        self._slots.put(slot, Computing(key, request.request_id, request.number))
        self._actions.append(StartCompute(slot, key, request.request_id))

    def _overdue(self, request: Request) -> Request | None:
        """An older request whose need of a slot was passed over too often; if there is one that may be passed over once
        more, it is."""
        absent = self._requests.first_absent(self._slots)
        if absent is None or absent[0].number >= request.number:
            return None
        older = absent[0]
        older.passed_over += 1
        has_room = self._slots.any_free() is not None or self._slots.resting()
        return older if older.passed_over > PATIENCE and not has_room else None

    # ---------------------------------------------------------------------------------------------- internals

    def _is_wanted(self, key: ExpertKey) -> bool:
        return self._wants.wanted(key) or self._requests.waited_for(key)

    def _pass_by(self, spans: Sequence[Span], layer: int, *, needed: Collection[int], all_of_layer: bool) -> None:
        self._count_cancelled(self._wants.pass_by(spans, layer, needed=needed, all_of_layer=all_of_layer))

    def _count_cancelled(self, orphans: Collection[ExpertKey]) -> None:
        """Of the keys no plan wants any more, count those that were never begun."""
        self.counters.loads_cancelled += sum(
            key not in self._slots and not self._requests.waited_for(key) for key in orphans
        )

    def _fail(self, request_id: int, code: FailureCode, reason: str) -> None:
        self._answers.append(Answer(ComputeFailed(request_id=request_id, code=code, reason=reason)))

    def _reset(self) -> None:
        """Forget all work; what is in flight ends in slots that nobody wants. Nothing rests any longer: to keep experts
        was that server's wish, and a node that waits for another one holds no memory. (One that is there already, by
        its view, says so itself.)"""
        self._actions += [Forget(request.request_id) for request in self._requests.all()]
        self._wants.clear()
        self._requests.clear()
        self._loader.leaving = {}
        self._welcomed, self._first_epoch, self._epoch, self._mode = False, None, 0, "on-demand"

    def _note(self, now: float, what: str, item: object) -> None:
        self.story.append((now, what, item))

    def check_integrity(self) -> None:
        """Assert what must hold between any two events."""
        self._slots.check_integrity()
        self._wants.check_integrity()
        self._requests.check_integrity()
        assert self._slots.num_loading <= self._loader.max_loading
        for slot, state in self._slots:
            match state:
                case Ready(key=key):
                    assert self._wants.wanted(key), f"slot {slot} holds {key}, which nobody wants"
                    assert not self._requests.waited_for(key), f"slot {slot}: {key} waits to be computed"
                case Resting(key=key):
                    assert self._mode != "on-demand", f"slot {slot}: {key} rests"
                    assert not self._is_wanted(key), f"slot {slot}: {key} rests, but is wanted"
                case Loading(key=key, unwanted=unwanted):
                    assert unwanted is not self._is_wanted(key)
                case Free() | Computing() | Riding():
                    pass
        self._check_loads()

    def _check_loads(self) -> None:
        """Assert that nothing waits for a link or a slot it could have."""
        absent = self._requests.first_absent(self._slots)
        waits = absent is not None or self._wants.first(resident=self._slots) is not None
        loading = self._slots.loading().values()
        has_room = self._slots.any_free() is not None or self._slots.resting()
        assert not (waits and has_room and not self._slots.num_loading), "an expert waits beside a link and a slot"
        stopping = sum(state.stopping for state in loading)
        assert stopping <= 1
        assert not (waits and not stopping and any(state.unwanted and not state.used for state in loading)), (
            "an unwanted load is waited for"
        )


def _name(key: ExpertKey) -> str:
    return f"layer {key.layer} expert {key.expert}"
