"""Loads that a device carries out by itself: the loop asks when they end, breaks them off, hears of those that fail."""

from pathlib import Path

import pytest
import torch

from odmoe_model.store import ExpertStore
from odmoe_node.bank_emulated import EmulatedBank
from odmoe_node.events import ExpertKey, LoadBroke, LoadDone, LoadStopped, StartLoad
from odmoe_node.timed import TimedLoads, TimedSlots
from support.stores import tiny_store

LOAD_S = 0.5


class Rig:
    """An emulated bank of two slots and its loads, on a clock that is set by hand."""

    def __init__(self, store: ExpertStore) -> None:
        self.now = 100.0
        bytes_per_s = store.manifest.record_bytes / LOAD_S
        self.bank = EmulatedBank(store, num_slots=2, bytes_per_s=bytes_per_s, clock=lambda: self.now)
        self.loads = TimedLoads(self.bank, clock=lambda: self.now)


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(ExpertStore.open(tiny_store("mixtral", tmp_path), verify=False))


def order(slot: int, expert: int, *, layer: int = 1) -> StartLoad:
    return StartLoad(slot, ExpertKey(layer, expert))


def test_a_load_ends_when_the_link_has_brought_it_and_is_told_once(rig: Rig) -> None:
    assert isinstance(rig.bank, TimedSlots)
    assert rig.loads.begin(order(0, 3)) is None
    assert rig.loads.left_s() == rig.loads.left_s(0) == pytest.approx(LOAD_S)
    rig.now += 0.4
    assert rig.loads.take() is None
    rig.now += 0.2
    event = rig.loads.take()
    assert isinstance(event, LoadDone)
    assert (event.slot, event.load_s) == (0, pytest.approx(LOAD_S))
    assert event.ended_s == pytest.approx(100.5), "when it ended, not when somebody asked"
    assert rig.loads.take() is None
    assert rig.loads.left_s() is None
    x_NH = torch.ones(2, 64)
    whole = EmulatedBank(rig.bank._store, num_slots=1, bytes_per_s=1e12)
    whole.load(0, 1, 3)
    assert torch.equal(rig.bank.rows(0, x_NH), whole.rows(0, x_NH))


def test_loads_queue_on_the_link(rig: Rig) -> None:
    rig.loads.begin(order(0, 3))
    rig.loads.begin(order(1, 4))
    assert rig.loads.left_s(1) == pytest.approx(2 * LOAD_S)
    assert rig.loads.left_s() == pytest.approx(LOAD_S)
    rig.now += 1.5 * LOAD_S
    event = rig.loads.take()
    assert isinstance(event, LoadDone)
    assert event.slot == 0
    assert rig.loads.take() is None


def test_a_load_broken_off_gives_the_link_back(rig: Rig) -> None:
    rig.loads.begin(order(0, 3))
    rig.now += 0.1
    assert rig.loads.break_off(0) == LoadStopped(0, pytest.approx(0.1))
    assert rig.loads.break_off(0) is None, "it has ended"
    assert rig.loads.take() is None
    rig.loads.begin(order(0, 4))
    assert rig.loads.left_s(0) == pytest.approx(LOAD_S)


def test_a_load_that_cannot_begin_is_told_with_its_reason(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(layer: int, expert: int) -> torch.Tensor:
        raise OSError("the disk has gone")

    monkeypatch.setattr(rig.bank._store, "record", unreadable)
    assert rig.loads.begin(order(0, 3)) == LoadBroke(0, "OSError: the disk has gone")
    assert rig.loads.left_s() is None
