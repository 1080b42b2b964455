"""A bank smaller than one expert: the bytes it holds, what it computes, and what the emulated link takes."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from odmoe_model.experts import ExpertMaths
from odmoe_model.prepare import prepare
from odmoe_model.slices import SlicedMaths
from odmoe_model.store import ExpertStore
from odmoe_node.bank import open_bank
from odmoe_node.bank_emulated import EmulatedLink
from odmoe_node.bank_sliced import SlicedBank
from odmoe_node.slice_carriers import EmulatedCarrier, HostCarrier
from odmoe_node.stopping import BrokenOffError, Stop
from support.stores import tiny_store
from support.tiny import FAMILIES, tiny_model

# Parts of an expert the budget is; the slices divide the intermediate size for hardly any of them.
SHARES = [0.9, 0.5, 0.17]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ExpertStore:
    return ExpertStore.open(tiny_store("gpt_oss", tmp_path_factory.mktemp("sliced")), verify=False)


def bank_of(store: ExpertStore, share: float) -> tuple[SlicedBank, int]:
    budget_bytes = int(share * store.manifest.record_bytes)
    bank = open_bank(store, num_slots=1, device="cpu", budget_bytes=budget_bytes)
    assert isinstance(bank, SlicedBank)
    return bank, budget_bytes


def rows_of_whole(store: ExpertStore, layer: int, expert: int, x_NH: Tensor) -> Tensor:
    return ExpertMaths(store.manifest).rows(store.fields(store.record(layer, expert)), x_NH)


def some_rows(store: ExpertStore, num_rows: int = 3) -> Tensor:
    return torch.randn(num_rows, store.manifest.hidden_size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_in_slices_what_it_computes_whole(family: str, tmp_path: Path) -> None:
    store = ExpertStore.open(tiny_store(family, tmp_path), verify=False)
    x_NH = some_rows(store)
    for share in SHARES:
        bank, budget_bytes = bank_of(store, share)
        for layer, expert in [(0, 1), (1, 0), (1, 7)]:
            assert bank.load(0, layer, expert) > 0
            assert_true_bytes(bank, budget_bytes)
            for _ in range(2):  # an expert may be computed again without being loaded again
                expected_NH = rows_of_whole(store, layer, expert, x_NH)
                torch.testing.assert_close(bank.rows(0, x_NH), expected_NH, rtol=1e-5, atol=1e-5)
                assert_true_bytes(bank, budget_bytes)


def assert_true_bytes(bank: SlicedBank, budget_bytes: int) -> None:
    """All that the bank computes on lies in one arena, which is as large as it says and within the budget."""
    assert isinstance(bank._carrier, HostCarrier)
    arena = bank._carrier.arena_B.untyped_storage()
    held = {part.untyped_storage().data_ptr() for part in [*bank._fixed, *(part for b in bank._parts for part in b)]}
    assert held == {arena.data_ptr()}
    assert arena.nbytes() == bank.arena_bytes == bank.slot_bytes <= budget_bytes


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_bfloat16_is_summed_in_float32(family: str, tmp_path: Path) -> None:
    """Many slices are as near to the exact result as the whole expert is; summed in bfloat16 they are twice as far."""
    tiny_model(family).to(torch.bfloat16).save_pretrained(tmp_path / "checkpoint")
    prepare(tmp_path / "checkpoint", tmp_path / "store")
    store = ExpertStore.open(tmp_path / "store", verify=False)
    bank, _ = bank_of(store, 0.07)
    x_NH = some_rows(store, 16).bfloat16()
    exact = {name: field.double() for name, field in store.fields(store.record(1, 2)).items()}
    exact_NH = ExpertMaths(store.manifest).rows(exact, x_NH.double())
    bank.load(0, 1, 2)
    y_NH = bank.rows(0, x_NH)
    assert y_NH.dtype == torch.bfloat16
    of_whole = (rows_of_whole(store, 1, 2, x_NH) - exact_NH).norm()
    assert (y_NH - exact_NH).norm() < 1.3 * of_whole


class Allocations(TorchDispatchMode):
    """Sizes of what operations of this thread return, unless it lies in `arena`."""

    def __init__(self, arena: Tensor) -> None:
        super().__init__()
        self.arena, self.sizes_bytes = arena.untyped_storage().data_ptr(), [0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [item for item in tree_leaves(result) if isinstance(item, Tensor)]
        storages = [tensor.untyped_storage() for tensor in tensors]
        self.sizes_bytes += [storage.nbytes() for storage in storages if storage.data_ptr() != self.arena]
        return result


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_computation_copies_no_weights(family: str, tmp_path: Path) -> None:
    """Beside the arena there are activations only: concatenated gate and up parts, for one, are not put together."""
    store = ExpertStore.open(tiny_store(family, tmp_path), verify=False)
    bank, _ = bank_of(store, 0.5)
    assert isinstance(bank._carrier, HostCarrier)
    bank.load(0, 0, 0)
    with Allocations(bank._carrier.arena_B) as seen:
        bank.rows(0, some_rows(store, 1))
    assert 0 < max(seen.sizes_bytes) <= 2 * 64 * 4, "a row of 64, gate and up"


class Watch:
    """A clock that moves when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0

    def read(self) -> float:
        return self.now

    def pass_time(self, stop: Stop, seconds: float) -> bool:
        self.now += seconds
        return stop.is_set()


def emulated(store: ExpertStore, watch: Watch, *, share: float) -> SlicedBank:
    maths = SlicedMaths(store.manifest)
    link = EmulatedLink(bytes_per_s=payload_bytes(store), clock=watch.read, sleep=watch.pass_time)
    plan = maths.plan(int(share * store.manifest.record_bytes))
    return SlicedBank(store, maths=maths, plan=plan, carrier=EmulatedCarrier(link), forget=lambda record_B: None)


def payload_bytes(store: ExpertStore) -> int:
    """Of a record without what aligns its fields."""
    return sum(field.size_bytes for field in store.manifest.record)


@pytest.mark.parametrize("share", SHARES)
def test_the_links_time_of_all_slices_is_that_of_the_record(store: ExpertStore, share: float) -> None:
    watch = Watch()
    bank = emulated(store, watch, share=share)
    bank.load(0, 0, 3)
    assert 100.0 < watch.now < 101.0, "the first slices only"
    y_NH = bank.rows(0, some_rows(store))
    assert watch.now == pytest.approx(101.0)
    torch.testing.assert_close(y_NH, rows_of_whole(store, 0, 3, some_rows(store)), rtol=1e-5, atol=1e-5)


def test_an_emulated_budget_below_one_expert_is_taken(store: ExpertStore) -> None:
    bank = open_bank(store, num_slots=1, device="emulated", link_gbps=1.0, budget_bytes=store.manifest.record_bytes - 1)
    assert isinstance(bank, SlicedBank)
    bank.load(0, 1, 1)
    x_NH = some_rows(store)
    torch.testing.assert_close(bank.rows(0, x_NH), rows_of_whole(store, 1, 1, x_NH), rtol=1e-5, atol=1e-5)
    assert bank.arena_bytes < store.manifest.record_bytes


class Recording:
    """A host carrier that tells in which order slices come and are done with, and can be made to fail."""

    def __init__(self, places_bytes: Sequence[int]) -> None:
        self.device = torch.device("cpu")
        self.story: list[tuple[str, int]] = []
        self.fails_after = 1_000
        self._carrier = HostCarrier(places_bytes)

    def bring(self, place: int, sources: Sequence[Tensor], *, stop: Stop | None = None) -> list[Tensor]:
        self.story.append(("bring", place))
        if len(self.story) > self.fails_after:
            raise OSError(5, "Input/output error")
        return self._carrier.bring(place, sources, stop=stop)

    def used(self, place: int) -> None:
        self.story.append(("used", place))


def recorded(store: ExpertStore, share: float) -> tuple[SlicedBank, Recording]:
    maths = SlicedMaths(store.manifest)
    plan = maths.plan(int(share * store.manifest.record_bytes))
    carrier = Recording([*[plan.slice_bytes] * plan.num_buffers, plan.fixed_bytes])
    return SlicedBank(store, maths=maths, plan=plan, carrier=carrier, forget=lambda record_B: None), carrier


def test_a_slice_takes_the_buffer_of_one_that_was_computed_while_the_next_is_ready(store: ExpertStore) -> None:
    bank, carrier = recorded(store, 0.5)  # five slices, two at a time; the bias of the down projection is place 2
    bank.load(0, 0, 0)
    assert carrier.story == [("bring", 2), ("bring", 0), ("bring", 1)]
    bank.rows(0, some_rows(store))
    later = carrier.story[3:]
    assert [item for item in later if item[0] == "used"] == [("used", number % 2) for number in range(5)]
    assert [item for item in later if item[0] == "bring"] == [("bring", number % 2) for number in range(2, 5)]
    for place in (0, 1):
        turns = [what for what, where in later if where == place]
        assert turns == ["used", "bring"] * (len(turns) // 2) + ["used"] * (len(turns) % 2), "never while it is needed"


def test_a_slice_that_cannot_be_read_fails_the_computation_and_nothing_else(store: ExpertStore) -> None:
    bank, carrier = recorded(store, 0.5)
    bank.load(0, 0, 0)
    carrier.fails_after = 5
    with pytest.raises(OSError, match="Input/output error"):
        bank.rows(0, some_rows(store))
    carrier.fails_after = 1_000
    for layer, expert in [(0, 0), (1, 4)]:
        bank.load(0, layer, expert)
        x_NH = some_rows(store)
        torch.testing.assert_close(bank.rows(0, x_NH), rows_of_whole(store, layer, expert, x_NH), rtol=1e-5, atol=1e-5)


def test_a_load_is_broken_off_and_leaves_nothing_to_compute_on_by_mistake(store: ExpertStore) -> None:
    bank, _ = bank_of(store, 0.5)
    bank.load(0, 0, 0)
    stop = threading.Event()
    stop.set()
    with pytest.raises(BrokenOffError):
        bank.load(0, 2, 5, stop=stop)
    assert bank._held == [None, None]
    bank.load(0, 2, 6)
    x_NH = some_rows(store)
    torch.testing.assert_close(bank.rows(0, x_NH), rows_of_whole(store, 2, 6, x_NH), rtol=1e-5, atol=1e-5)


def test_the_records_pages_are_given_back_after_each_slice(store: ExpertStore) -> None:
    forgotten: list[int] = []
    bank, _ = recorded(store, 0.5)
    bank._forget = lambda record_B: forgotten.append(record_B.data_ptr())
    bank.load(0, 1, 3)
    bank.rows(0, some_rows(store))
    assert forgotten == [store.record(1, 3).data_ptr()] * len(bank._plan.bounds)


def test_less_than_the_smallest_slice_is_refused_with_the_need(store: ExpertStore) -> None:
    with pytest.raises(ValueError, match=r"holds no slice of an expert: .* takes \d+ bytes"):
        open_bank(store, num_slots=1, device="cpu", budget_bytes=1000)
