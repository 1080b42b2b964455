"""The emulated device: loads take a link's time one after another, move no bytes, and are accounted as if they did."""

import threading
import time
from pathlib import Path
from typing import get_args

import pytest
import torch

from odmoe_model.experts import ExpertMaths
from odmoe_model.store import ExpertStore
from odmoe_node import bank_emulated
from odmoe_node.bank import Device, open_bank
from odmoe_node.bank_emulated import EmulatedBank, LinkTime, available_bytes
from odmoe_node.config import NodeSettings
from odmoe_node.stopping import BrokenOffError, Stop
from odmoe_server.config import ServeSettings
from odmoe_wire.settings import SettingsError, load
from support.stores import tiny_store


class Watch:
    """A clock that moves when somebody sleeps; `late_s` is how much too late they wake, `early` how often too
    early."""

    def __init__(self, *, late_s: float = 0.0, early: int = 0) -> None:
        self.now = 100.0
        self._late_s, self._early = late_s, early

    def read(self) -> float:
        return self.now

    def pass_time(self, stop: Stop, seconds: float) -> bool:
        if self._early:
            self._early -= 1
            self.now += seconds / 2
        else:
            self.now += seconds + self._late_s
        return stop.is_set()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ExpertStore:
    return ExpertStore.open(tiny_store("gpt_oss", tmp_path_factory.mktemp("emulated")), verify=False)


def bank_on(store: ExpertStore, watch: Watch, *, seconds_a_record: float = 0.5) -> EmulatedBank:
    bytes_per_s = store.manifest.record_bytes / seconds_a_record
    return EmulatedBank(store, num_slots=2, bytes_per_s=bytes_per_s, clock=watch.read, sleep=watch.pass_time)


def test_transfers_queue_on_the_link() -> None:
    link = LinkTime(bytes_per_s=100.0)
    assert link.end_s(50, now=10.0) == 10.5
    assert link.end_s(100, now=10.25) == 11.5, "begins when the first has ended"
    assert link.end_s(100, now=20.0) == 21.0, "an idle link saves nothing up"


def test_a_link_is_free_when_its_transfer_is_broken_off() -> None:
    link = LinkTime(bytes_per_s=100.0)
    link.end_s(100, now=10.0)
    link.break_off(10.25)
    assert link.end_s(100, now=10.25) == 11.25
    link.break_off(20.0)
    assert link.end_s(100, now=11.0) == 12.25, "a link that was idle is not busy for having been stopped"


def test_a_load_that_is_told_to_stop_leaves_an_empty_slot_and_a_free_link(store: ExpertStore) -> None:
    stop = threading.Event()

    class Stopping(Watch):
        def pass_time(self, stop: Stop, seconds: float) -> bool:
            if seconds == pytest.approx(0.5) and not told:
                told.append(seconds)
                self.now += 0.125
                return True
            return super().pass_time(stop, seconds)

    told: list[float] = []
    watch = Stopping()
    bank = bank_on(store, watch)
    with pytest.raises(BrokenOffError):
        bank.load(0, 0, 0, stop=stop)
    with pytest.raises(AssertionError, match="slot 0 holds nothing"):
        bank.rows(0, torch.zeros(1, 64))
    assert bank.load(0, 0, 1) == pytest.approx(0.5), "it does not wait for the rest of the former"
    assert watch.now == pytest.approx(100.625)


def test_a_sleeping_load_hears_at_once_that_it_is_to_stop(store: ExpertStore) -> None:
    """On the real clock: the transfer would take a minute."""
    bank = EmulatedBank(store, num_slots=1, bytes_per_s=store.manifest.record_bytes / 60)
    stop = threading.Event()
    threading.Timer(0.01, stop.set).start()
    began_s = time.monotonic()
    with pytest.raises(BrokenOffError):
        bank.load(0, 0, 0, stop=stop)
    assert time.monotonic() - began_s < 30


def test_a_load_takes_bytes_over_speed(store: ExpertStore) -> None:
    watch = Watch()
    bank = bank_on(store, watch)
    assert bank.load(0, 0, 0) == pytest.approx(0.5)
    assert bank.load(1, 0, 1) == pytest.approx(0.5)
    assert watch.now == pytest.approx(101.0)


def test_a_load_that_is_woken_early_sleeps_on(store: ExpertStore) -> None:
    watch = Watch(early=3)
    assert bank_on(store, watch).load(0, 0, 0) == pytest.approx(0.5)


def test_what_a_load_took_is_told_as_it_was(store: ExpertStore) -> None:
    assert bank_on(store, Watch(late_s=0.125)).load(0, 0, 0) == pytest.approx(0.625)


def test_a_slot_lends_the_pages_of_the_store_and_computes_on_them(store: ExpertStore) -> None:
    bank = bank_on(store, Watch())
    maths = ExpertMaths(store.manifest)
    x_NH = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    for slot, layer, expert in [(0, 0, 1), (1, 1, 0), (0, 2, 7)]:
        bank.load(slot, layer, expert)
        record_B = store.record(layer, expert)
        addresses = {field.data_ptr() for field in (bank._slots[slot] or {}).values()}
        assert addresses == {field.data_ptr() for field in store.fields(record_B).values()}
        assert torch.equal(bank.rows(slot, x_NH), maths.rows(store.fields(record_B), x_NH))


def test_the_arena_is_accounted_as_if_it_were_there(store: ExpertStore) -> None:
    assert bank_on(store, Watch()).arena_bytes == 2 * store.manifest.record_bytes


def test_nothing_can_be_computed_before_the_link_has_brought_it(store: ExpertStore) -> None:
    seen: list[object] = []

    class Spying(Watch):
        def pass_time(self, stop: Stop, seconds: float) -> bool:
            seen.append(bank._slots[0])
            return super().pass_time(stop, seconds)

    bank = bank_on(store, Spying())
    with pytest.raises(AssertionError, match="slot 0 holds nothing"):
        bank.rows(0, torch.zeros(1, 64))
    bank.load(0, 0, 0)
    bank.load(0, 0, 1)
    assert seen == [None, None], "neither the new expert nor the one before"
    assert bank._slots[0] is not None


def test_every_record_is_touched_at_the_start(store: ExpertStore, monkeypatch: pytest.MonkeyPatch) -> None:
    touched: list[tuple[int, int]] = []
    record = ExpertStore.record

    def spy(self: ExpertStore, layer: int, expert: int) -> torch.Tensor:
        touched.append((layer, expert))
        return record(self, layer, expert)

    monkeypatch.setattr(ExpertStore, "record", spy)
    bank_on(store, Watch())
    assert set(touched) == {(layer, expert) for layer in range(3) for expert in range(8)}


def test_a_store_that_does_not_fit_into_memory_is_refused(store: ExpertStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bank_emulated, "available_bytes", lambda: 1000)
    with pytest.raises(ValueError, match="keeps all experts in memory"):
        open_bank(store, num_slots=1, device="emulated", link_gbps=1.0)


def test_available_memory_is_known_on_linux() -> None:
    available = available_bytes()
    assert available is not None or not Path("/proc/meminfo").exists()
    assert available is None or available > 1_000_000


def test_the_rate_is_in_gigabytes_a_second(store: ExpertStore) -> None:
    bank = open_bank(store, num_slots=1, device="emulated", link_gbps=0.5)
    assert isinstance(bank, EmulatedBank)
    assert bank._link.end_s(1_000_000_000, now=0.0) == pytest.approx(2.0)


NEEDED = ["--store", "/models/store", "--server-endpoint", "tcp://127.0.0.1:5570"]


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["{device}", "emulated"], "needs --link-gbps"),
        (["--link-gbps", "2"], "is for {device} emulated"),
        (["{device}", "cpu", "--link-gbps", "2"], "is for {device} emulated"),
        (["{device}", "emulated", "--link-gbps", "0"], "--link-gbps"),
        (["{device}", "emulated", "--link-gbps", "inf"], "--link-gbps"),
    ],
)
def test_rate_and_device_come_together(flags: list[str], complaint: str) -> None:
    for cls, device, needed in ((NodeSettings, "--device", NEEDED), (ServeSettings, "--node-device", [])):
        with pytest.raises(SettingsError, match=complaint.format(device=device)):
            load(cls, [*needed, *(flag.format(device=device) for flag in flags)], prog="x")


def test_rate_and_device_are_taken() -> None:
    node = load(NodeSettings, [*NEEDED, "--device", "emulated", "--link-gbps", "2.5"], prog="x")
    assert (node.device, node.link_gbps) == ("emulated", 2.5)


def test_the_server_knows_the_nodes_devices() -> None:
    assert get_args(ServeSettings.model_fields["node_device"].annotation) == get_args(Device)
