"""Slots on a CUDA device, whole and in slices; skipped where there is none. With `-s`, loads tell their bandwidth."""

import threading
import time

import pytest
import torch
from torch import Tensor

from odmoe_model.experts import ExpertMaths
from odmoe_model.store import ExpertStore
from odmoe_node.bank import CudaBank, open_bank
from odmoe_node.bank_sliced import SlicedBank
from odmoe_node.slice_carriers import CudaCarrier
from odmoe_node.stopping import BrokenOffError
from support.stores import tiny_store

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

KEYS = [(0, 1), (1, 0), (0, 3), (1, 2), (0, 1)]
WAIT_S = 60.0


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ExpertStore:
    """Transposed, biased and interleaved; a record of 11 MB goes out in three chunks, the last one a short one."""
    directory = tmp_path_factory.mktemp("cuda")
    shape = {"hidden_size": 512, "intermediate_size": 1792, "num_hidden_layers": 2, "num_local_experts": 4}
    return ExpertStore.open(tiny_store("gpt_oss", directory, **shape), verify=False)


@pytest.fixture
def bank(store: ExpertStore) -> CudaBank:
    bank = open_bank(store, num_slots=2, device="cuda")
    assert isinstance(bank, CudaBank)
    return bank


def some_rows(store: ExpertStore) -> Tensor:
    return 0.1 * torch.randn(3, store.manifest.hidden_size, generator=torch.Generator().manual_seed(1))


def assert_rows(y_NH: Tensor, store: ExpertStore, layer: int, expert: int) -> None:
    expected_NH = ExpertMaths(store.manifest).rows(store.fields(store.record(layer, expert)), some_rows(store))
    assert y_NH.device.type == "cpu"
    torch.testing.assert_close(y_NH, expected_NH, rtol=1e-4, atol=1e-4 * float(expected_NH.abs().max()))


class StopAfter:
    """A flag that is set when it has been asked for so many times."""

    def __init__(self, times: int) -> None:
        self.left = times

    def is_set(self) -> bool:
        self.left -= 1
        return self.left < 0

    def wait(self, timeout: float) -> bool:
        return self.is_set()


def test_a_load_brings_the_records_bytes(bank: CudaBank, store: ExpertStore) -> None:
    for slot, (layer, expert) in enumerate(KEYS):
        assert bank.load(slot % 2, layer, expert) > 0
        assert torch.equal(bank._slots_B[slot % 2].cpu(), store.record(layer, expert))
    assert bank._slots_B[0].untyped_storage().nbytes() == bank.arena_bytes == 2 * store.manifest.record_bytes


def test_a_slot_computes_what_was_loaded_into_it(bank: CudaBank, store: ExpertStore) -> None:
    for layer, expert in KEYS:
        bank.load(1, layer, expert)
        assert_rows(bank.rows(1, some_rows(store)), store, layer, expert)


def test_one_slot_is_computed_while_another_is_loaded(bank: CudaBank, store: ExpertStore) -> None:
    bank.load(0, 1, 3)
    loaded: list[tuple[int, int]] = []

    def load_often() -> None:
        for layer, expert in KEYS * 10:
            bank.load(1, layer, expert)
            loaded.append((layer, expert))

    loader = threading.Thread(target=load_often)
    loader.start()
    num_computed = 0
    while loader.is_alive() or num_computed == 0:
        assert_rows(bank.rows(0, some_rows(store)), store, 1, 3)
        num_computed += 1
    loader.join(WAIT_S)
    assert loaded == KEYS * 10
    assert torch.equal(bank._slots_B[1].cpu(), store.record(*loaded[-1]))


@pytest.mark.parametrize("num_chunks", [0, 1, 2])
def test_a_load_that_is_broken_off_leaves_the_next_one_right(
    bank: CudaBank, store: ExpertStore, num_chunks: int
) -> None:
    with pytest.raises(BrokenOffError):
        bank.load(0, 0, 0, stop=StopAfter(num_chunks))
    bank.load(0, 1, 1)
    assert torch.equal(bank._slots_B[0].cpu(), store.record(1, 1))


def test_the_bandwidth_of_loads_is_told(bank: CudaBank, store: ExpertStore, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside that of one copy out of pinned memory, which is what the link can do."""
    load_s = min(bank.load(0, layer, expert) for layer, expert in KEYS * 4)
    pinned_B = torch.empty(store.manifest.record_bytes, dtype=torch.uint8, pin_memory=True)
    peak_s = min(seconds_to_copy(pinned_B, bank._slots_B[1]) for _ in range(20))
    gigabytes = store.manifest.record_bytes / 1e9
    with capsys.disabled():
        print(f"\nloads of {1e3 * gigabytes:.1f} MB: {gigabytes / load_s:.2f} GB/s, link {gigabytes / peak_s:.2f} GB/s")
    assert torch.equal(bank._slots_B[0].cpu(), store.record(*KEYS[-1]))


def seconds_to_copy(source_B: Tensor, target_B: Tensor) -> float:
    torch.cuda.synchronize()
    began_s = time.perf_counter()
    target_B.copy_(source_B, non_blocking=True)
    torch.cuda.synchronize()
    return time.perf_counter() - began_s


@pytest.mark.parametrize("share", [0.6, 0.2, 0.02])
def test_slices_add_up_on_the_device(store: ExpertStore, share: float) -> None:
    budget_bytes = int(share * store.manifest.record_bytes)
    bank = open_bank(store, num_slots=1, device="cuda", budget_bytes=budget_bytes)
    assert isinstance(bank, SlicedBank)
    assert isinstance(bank._carrier, CudaCarrier)
    assert bank._carrier.arena_B.untyped_storage().nbytes() == bank.arena_bytes <= budget_bytes
    for layer, expert in KEYS:
        with pytest.raises(BrokenOffError):
            bank.load(0, 0, 0, stop=StopAfter(2))
        bank.load(0, layer, expert)
        for _ in range(2):
            assert_rows(bank.rows(0, some_rows(store)), store, layer, expert)
