"""Drives a node's pure core by hand: tells it things, keeps what it ordered, checks its integrity each time."""

from collections.abc import Iterable, Sequence
from typing import assert_never

from odmoe_node.events import (
    Action,
    Answer,
    BreakOff,
    ComputeBroke,
    ComputeDone,
    Event,
    ExpertKey,
    Forget,
    LoadBroke,
    LoadDone,
    LoadStopped,
    Mention,
    StartCompute,
    StartLoad,
    Tell,
    Told,
)
from odmoe_node.state import NodeState
from odmoe_wire.messages import (
    Cancel,
    Compute,
    ComputeFailed,
    Load,
    Member,
    Release,
    Result,
    Rollback,
    Schedule,
    SlotMode,
    Span,
    View,
    Welcome,
    Withdraw,
)

SLOT_BYTES = 1000


class NodeRig:
    """A welcomed node state at epoch 1 (unless `joined` is false) whose loads and computes end when told to.

    `stopping` are the slots whose load was broken off and has not ended; `actions` are those of the last event."""

    def __init__(self, *, num_slots: int, max_loading: int = 1, joined: bool = True, on_arrival: bool = False) -> None:
        self.state = NodeState(
            num_slots=num_slots, slot_bytes=SLOT_BYTES, max_loading=max_loading, on_arrival=on_arrival
        )
        self.num_slots = num_slots
        self.now = 0.0
        self.actions: list[Action] = []
        self.loading: list[StartLoad] = []
        self.stopping: set[int] = set()
        self.computing: list[StartCompute] = []
        self.answers: list[Result | ComputeFailed] = []
        self.told: list[object] = []
        self.forgotten = 0
        self._next_request = 0
        if joined:
            self.join(epoch=1)

    # ------------------------------------------------------------------------------- what others say

    def join(self, *, epoch: int) -> None:
        self.tell(Welcome(heartbeat_s=1.0, lost_after_s=5.0), epoch=epoch)
        self.view(epoch=epoch)

    def view(self, *, epoch: int, mode: SlotMode = "on-demand") -> None:
        self.tell(View(members=[Member("n", self.num_slots)], group_size=1, mode=mode), epoch=epoch)

    def forecast(
        self, layer: int, experts: Sequence[int], *, position: int = 0, sequence: int = 1, epoch: int = 1
    ) -> None:
        span = Span(sequence, position, 1)
        self.tell(Schedule(span=span, layer=layer, experts=list(experts)), epoch=epoch)

    def roll_back(self, position: int, *, sequence: int = 1, epoch: int = 1) -> None:
        self.tell(Rollback(sequence=sequence, position=position), epoch=epoch)

    def load(self, layer: int, experts: Sequence[int], *, span: Span | None = None, epoch: int = 1) -> None:
        self.tell(Load(spans=[span or Span(1, 0, 1)], layer=layer, experts=list(experts)), epoch=epoch)

    def compute(
        self,
        layer: int,
        experts: Sequence[int],
        *,
        position: int = 0,
        spans: Iterable[Span] = (),
        ttl_s: float = 100.0,
        request_id: int | None = None,
        rows: int = 1,
        epoch: int = 1,
    ) -> int:
        """Returns the request id."""
        if request_id is None:
            request_id, self._next_request = self._next_request, self._next_request + 1
        message = Compute(
            request_id=request_id,
            spans=list(spans) or [Span(1, position, 1)],
            layer=layer,
            experts=list(experts),
            counts=[rows] * len(experts),
            ttl_s=ttl_s,
        )
        self.tell(message, epoch=epoch)
        return request_id

    def release(self, layer: int, *, position: int = 0, sequence: int = 1) -> None:
        self.tell(Release(spans=[Span(sequence, position, 1)], layer=layer), epoch=1)

    def cancel(self, sequence: int = 1) -> None:
        self.tell(Cancel(sequence=sequence), epoch=1)

    def withdraw(self, request_id: int) -> None:
        self.tell(Withdraw(request_id=request_id), epoch=1)

    def tell(self, message: object, *, epoch: int) -> None:
        self.event(Told(message, epoch))  # type: ignore[arg-type]

    # -------------------------------------------------------------------------- what the executors do

    def end_load(self, load_s: float = 0.5) -> ExpertKey:
        """The load begun first ends well."""
        order = self._pop_load()
        self.event(LoadDone(order.slot, load_s, self.now))
        return order.key

    def break_load(self, reason: str = "disk on fire") -> ExpertKey:
        order = self._pop_load()
        self.event(LoadBroke(order.slot, reason))
        return order.key

    def stop_load(self) -> ExpertKey:
        """The load begun first was told to stop, and did."""
        order = self._pop_load(stopping=True)
        self.event(LoadStopped(order.slot, 0.125))
        return order.key

    def _pop_load(self, *, stopping: bool = False) -> StartLoad:
        order = self.loading.pop(0)
        assert order.slot in self.stopping or not stopping, f"nobody broke off the load of {order.key}"
        self.stopping.discard(order.slot)
        return order

    def end_compute(self, *, waited_s: float = 0.0) -> ExpertKey:
        """The compute begun first ends well."""
        order = self.computing.pop(0)
        self.event(ComputeDone(order.slot, 0.25, waited_s))
        return order.key

    def break_compute(self, reason: str = "broken") -> ExpertKey:
        order = self.computing.pop(0)
        self.event(ComputeBroke(order.slot, reason))
        return order.key

    def finish(self) -> None:
        """Let all loads and computes end until nothing is left to do."""
        for _ in range(10_000):
            if self.computing:
                self.end_compute()
            elif self.loading and self.loading[0].slot in self.stopping:
                self.stop_load()
            elif self.loading:
                self.end_load()
            else:
                return
        raise AssertionError("the node never comes to rest")

    def event(self, event: Event) -> None:
        self.now += 0.001
        self.actions = self.state.handle(event, self.now)
        for action in self.actions:
            self._take(action)
        self.state.check_integrity()
        assert self.state.accounted_bytes <= self.num_slots * SLOT_BYTES

    def _take(self, action: Action) -> None:
        match action:
            case StartLoad():
                self.loading.append(action)
            case BreakOff(slot=slot):
                assert slot in {order.slot for order in self.loading} - self.stopping, "not loading, or told twice"
                self.stopping.add(slot)
            case StartCompute():
                under_way = {order.slot for order in self.loading} - self.stopping
                assert action.on_arrival is (action.slot in under_way)
                self.computing.append(action)
            case Answer():
                self.answers.append(action.message)
            case Tell() | Mention():
                self.told.append(action.message)
            case Forget():
                self.forgotten += 1
            case _:
                assert_never(action)

    # -------------------------------------------------------------------------------------- questions

    @property
    def load_keys(self) -> list[ExpertKey]:
        return [order.key for order in self.loading]

    @property
    def held(self) -> set[ExpertKey]:
        """Keys in any slot."""
        slots = (self.state.slot(number) for number in range(self.num_slots))
        return {slot.key for slot in slots if hasattr(slot, "key")}

    def outcomes(self, answer: int = -1) -> dict[int, str]:
        result = self.answers[answer]
        assert isinstance(result, Result), result
        return {timing.expert: timing.outcome for timing in result.timings}
