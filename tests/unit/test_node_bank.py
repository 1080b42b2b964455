"""Slots' memory: the bytes that move are the store's, and there are as many as were allowed."""

import pytest
import torch

from odmoe_model.experts import ExpertMaths
from odmoe_model.store import ExpertStore
from odmoe_node.bank import CpuBank, SlotBank, open_bank, slots_within
from odmoe_node.pages import page_forgetter
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


def test_a_load_moves_bytes_into_the_arena_and_away_from_the_mapping(store: ExpertStore) -> None:
    """After it the slot has bytes of its own, and the record's pages were given back by its address."""
    forgotten: list[int] = []
    bank = CpuBank(store, num_slots=1, forget=lambda mapped_B: forgotten.append(mapped_B.data_ptr()))
    bank.load(0, 1, 3)
    assert forgotten == [store.record(1, 3).data_ptr()]
    assert bank._slots_B[0].data_ptr() != store.record(1, 3).data_ptr()
    assert torch.equal(bank._slots_B[0], store.record(1, 3))
    assert bank.arena_bytes == bank._slots_B[0].untyped_storage().nbytes()


def test_forgotten_pages_are_read_again(store: ExpertStore) -> None:
    record_B = store.record(0, 0)
    before = record_B.clone()
    page_forgetter()(record_B)
    assert torch.equal(record_B, before)


def test_slots_fit_the_budget_or_the_need_is_named() -> None:
    assert slots_within(10_000_000, record_bytes=3_000_000) == 3
    with pytest.raises(ValueError, match=r"one takes 10000001 bytes; give at least --memory-mb 11"):
        slots_within(10_000_000, record_bytes=10_000_001)


def test_more_than_there_is_memory_for_is_refused(store: ExpertStore) -> None:
    with pytest.raises(ValueError, match="use fewer"):
        open_bank(store, num_slots=1 << 40, device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_cuda_is_refused_where_there_is_none(store: ExpertStore) -> None:
    with pytest.raises(ValueError, match="--device cpu"):
        open_bank(store, num_slots=1, device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_slot_on_cuda_computes_what_was_loaded_into_it(store: ExpertStore) -> None:
    check_bank(open_bank(store, num_slots=2, device="cuda"), store, exact=False)
