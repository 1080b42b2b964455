"""Computing on arrival: an expert's first stage while the rest of its record is still on the link. To the bit."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from odmoe_model.experts import ExpertMaths
from odmoe_model.store import ExpertStore
from odmoe_node import arrival
from odmoe_node.arrival import Arrival, EndedEarlyError
from odmoe_node.bank_emulated import EmulatedBank
from odmoe_node.stopping import BrokenOffError, Stop
from support.stores import tiny_store
from support.tiny import FAMILIES

LOAD_S = 8.0
UP_S, DOWN_S = 2.0, 1.0


class Watch:
    """A clock that moves when somebody sleeps on it, and calls `meanwhile` once, in the first sleep."""

    def __init__(self) -> None:
        self.now = 100.0
        self.meanwhile: Callable[[], None] | None = None

    def read(self) -> float:
        return self.now

    def sleep(self, stop: Stop, seconds: float) -> bool:
        if self.meanwhile is not None:
            call, self.meanwhile = self.meanwhile, None
            call()
        elif not stop.is_set():
            self.now += seconds
        return stop.is_set()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ExpertStore:
    return ExpertStore.open(tiny_store("mixtral", tmp_path_factory.mktemp("arrival")), verify=False)


def bank_on(store: ExpertStore, watch: Watch) -> EmulatedBank:
    bytes_per_s = store.manifest.record_bytes / LOAD_S
    return EmulatedBank(store, num_slots=1, bytes_per_s=bytes_per_s, clock=watch.read, sleep=watch.sleep)


def random_rows(store: ExpertStore, count: int) -> Tensor:
    return torch.randn(count, store.manifest.hidden_size, generator=torch.Generator().manual_seed(count))


def slow_stages(monkeypatch: pytest.MonkeyPatch, watch: Watch) -> list[tuple[str, float]]:
    """Let either stage take its time on the clock; returns when each began."""
    began: list[tuple[str, float]] = []

    def slow(stage: str, seconds: float) -> None:
        whole = getattr(ExpertMaths, stage)

        def run(self: ExpertMaths, fields: dict[str, Tensor], x: Tensor, runs: Sequence[int]) -> Tensor:
            began.append((stage, watch.now))
            watch.now += seconds
            result: Tensor = whole(self, fields, x, runs)
            return result

        monkeypatch.setattr(ExpertMaths, stage, run)

    slow("up", UP_S)
    slow("down", DOWN_S)
    return began


def expected(store: ExpertStore, layer: int, expert: int, x_NH: Tensor) -> Tensor:
    return ExpertMaths(store.manifest).rows(store.fields(store.record(layer, expert)), x_NH)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_on_arrival_the_same_bits(family: str, tmp_path: Path) -> None:
    store = ExpertStore.open(tiny_store(family, tmp_path), verify=False)
    watch = Watch()
    bank = bank_on(store, watch)
    for expert, count in ((0, 1), (3, 5)):
        x_NH = random_rows(store, count)
        found: list[tuple[Tensor, float]] = []
        watch.meanwhile = lambda x=x_NH, found=found: found.append(bank.rows_on_arrival(0, x))  # type: ignore[misc]
        bank.load(0, 0, expert)
        assert torch.equal(found[0][0], expected(store, 0, expert, x_NH))
        assert torch.equal(bank.rows(0, x_NH), found[0][0])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_stage_touches_nothing_that_has_not_arrived(family: str, tmp_path: Path) -> None:
    store = ExpertStore.open(tiny_store(family, tmp_path), verify=False)
    maths, x_NH = ExpertMaths(store.manifest), random_rows(store, 3)
    whole_B = store.record(0, 2).clone()
    torn_B = whole_B.clone()
    torn_B[maths.up_bytes :] = 255
    h_NI = maths.up(store.fields(torn_B), x_NH)
    assert torch.equal(h_NI, maths.up(store.fields(whole_B), x_NH))
    assert not torch.equal(maths.down(store.fields(torn_B), h_NI), maths.down(store.fields(whole_B), h_NI))


def test_the_first_stage_has_two_thirds_of_a_gated_experts_bytes(store: ExpertStore) -> None:
    assert ExpertMaths(store.manifest).up_bytes == pytest.approx(2 / 3 * store.manifest.record_bytes, rel=0.01)


def test_the_first_stage_is_computed_while_the_rest_is_on_the_link(
    store: ExpertStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left behind the load's end is the second stage: 1 s instead of 3."""
    watch = Watch()
    began = slow_stages(monkeypatch, watch)
    bank, x_NH = bank_on(store, watch), random_rows(store, 1)
    waits: list[float] = []
    watch.meanwhile = lambda: waits.append(bank.rows_on_arrival(0, x_NH)[1])
    bank.load(0, 0, 1)
    up_s = 100.0 + LOAD_S * 2 / 3
    assert [stage for stage, _ in began] == ["up", "down"]
    assert [at_s for _, at_s in began] == pytest.approx([up_s, 100.0 + LOAD_S], abs=0.01)
    assert watch.now == pytest.approx(100.0 + LOAD_S + DOWN_S, abs=0.01)
    assert waits == pytest.approx([LOAD_S - UP_S], abs=0.01), "what it computed meanwhile is no waiting"


def test_rows_that_come_late_wait_for_nothing_that_is_there(
    store: ExpertStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch()
    began = slow_stages(monkeypatch, watch)
    bank, x_NH = bank_on(store, watch), random_rows(store, 1)
    waits: list[float] = []

    def late() -> None:
        watch.now += 7.0
        waits.append(bank.rows_on_arrival(0, x_NH)[1])

    watch.meanwhile = late
    bank.load(0, 0, 1)
    assert began == [("up", 107.0), ("down", 109.0)]
    assert waits == [0.0]
    assert torch.equal(bank.rows_on_arrival(0, x_NH)[0], expected(store, 0, 1, x_NH)), "the load has ended"


def test_a_load_that_fails_fails_the_compute(store: ExpertStore) -> None:
    watch = Watch()
    bank, x_NH = bank_on(store, watch), random_rows(store, 1)
    bank.expect(0)
    with pytest.raises(IndexError):
        bank.load(0, 99, 1)
    with pytest.raises(EndedEarlyError):
        bank.rows_on_arrival(0, x_NH)
    bank.load(0, 0, 1)
    assert torch.equal(bank.rows_on_arrival(0, x_NH)[0], expected(store, 0, 1, x_NH))


def test_a_compute_hears_at_once_that_its_load_was_broken_off_and_may_begin_before_it(store: ExpertStore) -> None:
    """On threads and the real clock: the transfer would take a minute."""
    bank = EmulatedBank(store, num_slots=1, bytes_per_s=store.manifest.record_bytes / 60)
    stop, errors = threading.Event(), list[str]()

    def compute() -> None:
        with pytest.raises(EndedEarlyError) as raised:
            bank.rows_on_arrival(0, random_rows(store, 1))
        errors.append(str(raised.value))

    bank.expect(0)
    thread = threading.Thread(target=compute, daemon=True)
    thread.start()
    threading.Timer(0.05, stop.set).start()
    with pytest.raises(BrokenOffError):
        bank.load(0, 0, 1, stop=stop)
    thread.join(30)
    assert errors == ["the load failed or was broken off"]


def test_a_load_that_never_begins_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrival, "PATIENCE_S", 0.0)
    with pytest.raises(EndedEarlyError, match="has not begun"):
        Arrival().under_way()
