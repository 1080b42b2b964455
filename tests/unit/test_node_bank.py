"""Slots' memory: the bytes that move are the store's, and there are as many as were allowed."""

import logging
import mmap
from typing import Any

import pytest
import torch

from odmoe_model.experts import ExpertMaths
from odmoe_model.store import ExpertStore
from odmoe_node import bank as bank_module
from odmoe_node import pages
from odmoe_node.bank import CpuBank, CudaBank, SlotBank, open_bank, slots_within
from odmoe_node.pages import page_forgetter
from odmoe_node.stopping import BrokenOffError
from support.stores import tiny_store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ExpertStore:
    return ExpertStore.open(tiny_store("gpt_oss", tmp_path_factory.mktemp("bank")), verify=False)


def check_bank(bank: SlotBank, store: ExpertStore, *, exact: bool) -> None:
    maths = ExpertMaths(store.manifest)
    x_NH = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    for slot, layer, expert in [(0, 0, 1), (1, 1, 0), (0, 2, 7), (1, 1, 0)]:
        assert bank.load(slot, layer, expert) > 0
        expected_NH = maths.rows(store.fields(store.record(layer, expert)), x_NH)
        tolerance = 0.0 if exact else 1e-4
        torch.testing.assert_close(bank.rows(slot, x_NH), expected_NH, rtol=tolerance, atol=tolerance)


def test_a_slot_computes_what_was_loaded_into_it(store: ExpertStore) -> None:
    check_bank(open_bank(store, num_slots=2, device="cpu"), store, exact=True)


def test_a_slot_holds_the_stores_own_pages_until_the_next_load_gives_them_back(store: ExpertStore) -> None:
    forgotten: list[int] = []
    bank = CpuBank(store, num_slots=2, forget=lambda mapped_B: forgotten.append(mapped_B.data_ptr()))
    bank.load(0, 1, 3)
    bank.load(1, 2, 4)
    assert forgotten == []
    bank.load(0, 2, 4)
    assert forgotten == [store.record(1, 3).data_ptr()]
    bank.load(1, 0, 0)
    assert forgotten == [store.record(1, 3).data_ptr()], "the other slot has this one too"
    bank.load(0, 0, 1)
    assert forgotten == [store.record(1, 3).data_ptr(), store.record(2, 4).data_ptr()]
    assert bank.arena_bytes == 2 * store.manifest.record_bytes


def test_pages_are_touched_where_the_kernel_does_not_bring_them(store: ExpertStore) -> None:
    record_B = store.record(0, 0)
    touched: list[int] = []

    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.Tensor.max:
                touched.append(args[0].numel())
            return super().__torch_function__(func, types, args, kwargs or {})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages.sys, "platform", "other")
        pages.fetch_pages(record_B.as_subclass(Watched))
        pages.fetch_pages(record_B[:0])
    assert touched == [-(-record_B.numel() // mmap.PAGESIZE)]


def test_forgotten_pages_are_read_again(store: ExpertStore) -> None:
    record_B = store.record(0, 0)
    before = record_B.clone()
    page_forgetter()(record_B)
    assert torch.equal(record_B, before)


def test_slots_fit_the_budget_and_below_one_expert_there_is_one_for_slices() -> None:
    assert slots_within(10_000_000, record_bytes=3_000_000) == 3
    assert slots_within(10_000_000, record_bytes=10_000_000) == 1
    assert slots_within(10_000_000, record_bytes=10_000_001) == 1


def test_a_bank_says_at_the_start_what_it_is(store: ExpertStore, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="odmoe_node")
    bank = open_bank(store, num_slots=40, device="cpu")
    assert caplog.messages == [f"slots: 40, {bank.arena_bytes / 1e6:.1f} MB together, device cpu"]
    assert bank.arena_bytes == 40 * bank.slot_bytes == 40 * store.manifest.record_bytes


def test_more_than_there_is_memory_for_is_refused(store: ExpertStore) -> None:
    with pytest.raises(ValueError, match="use fewer"):
        open_bank(store, num_slots=1 << 40, device="cpu")


class StopAfter:
    """A flag that is set once it was looked at `looks` times."""

    def __init__(self, looks: int) -> None:
        self._looks = looks

    def is_set(self) -> bool:
        self._looks -= 1
        return self._looks < 0

    def wait(self, timeout: float) -> bool:
        raise AssertionError("a bank that copies does not sleep")


def test_a_load_that_is_told_to_stop_stops_at_the_next_chunk(
    store: ExpertStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[int] = []
    monkeypatch.setattr(bank_module, "fetch_pages", lambda mapped_B: fetched.append(mapped_B.numel()))
    forgotten: list[int] = []
    bank = CpuBank(store, num_slots=1, forget=lambda mapped_B: forgotten.append(mapped_B.data_ptr()))
    bank.CHUNK_BYTES = bank.record_bytes // 4 + 1
    with pytest.raises(BrokenOffError):
        bank.load(0, 2, 5, stop=StopAfter(2))
    assert fetched == [bank.CHUNK_BYTES] * 2
    assert bank.load(0, 0, 1, stop=StopAfter(4)) > 0
    assert sum(fetched[2:]) == bank.record_bytes
    assert forgotten == [store.record(2, 5).data_ptr()], "the pages read in vain are given back too"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_load_to_cuda_that_is_told_to_stop_stops_at_the_next_chunk(
    store: ExpertStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one into the same slot is as if it had not been."""
    monkeypatch.setattr(CudaBank, "CHUNK_BYTES", store.manifest.record_bytes // 4 + 1)
    bank = CudaBank(store, num_slots=1, forget=lambda mapped_B: None)
    bank.load(0, 1, 0)
    with pytest.raises(BrokenOffError):
        bank.load(0, 2, 5, stop=StopAfter(2))
    arrived_B = bank._slots_B[0].cpu() == store.record(2, 5)
    assert arrived_B[: 2 * bank.CHUNK_BYTES].all(), "two chunks had been copied"
    assert not arrived_B[2 * bank.CHUNK_BYTES :].all()
    assert bank.load(0, 0, 1, stop=StopAfter(4)) > 0
    assert torch.equal(bank._slots_B[0].cpu(), store.record(0, 1))


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_cuda_is_refused_where_there_is_none(store: ExpertStore) -> None:
    with pytest.raises(ValueError, match="--device cpu"):
        open_bank(store, num_slots=1, device="cuda")
