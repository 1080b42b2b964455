"""Rows that belong to different sequences: each run of them gets the bits of a call of its own, in every bank."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from odmoe_model import runs as by_blocks
from odmoe_model.experts import ExpertMaths
from odmoe_model.store import ExpertStore
from odmoe_node.bank import SlotBank, open_bank
from odmoe_node.bank_emulated import EmulatedBank
from odmoe_node.bank_sliced import SlicedBank
from odmoe_node.pace import Pace
from odmoe_node.requests import runs_of
from odmoe_wire.messages import Compute, Span
from support.stores import tiny_store
from support.tiny import FAMILIES

RUNS: list[Sequence[int]] = [(1, 1, 1, 1, 1), (1,) * 9, (3, 1, 1), (1, 4), (2, 2), (6,), ()]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ExpertStore:
    return ExpertStore.open(tiny_store("mixtral", tmp_path_factory.mktemp("runs")), verify=False)


def random_rows(store: ExpertStore, runs: Sequence[int], *, dtype: torch.dtype = torch.float32) -> Tensor:
    dice = torch.Generator().manual_seed(sum(runs))
    return torch.randn(sum(runs) or 3, store.manifest.hidden_size, generator=dice).to(dtype)


def alone(bank: SlotBank, x_NH: Tensor, runs: Sequence[int]) -> Tensor:
    """Each run in a call of its own, on a copy that nothing lies beside."""
    return torch.cat([bank.rows(0, x_RH.clone()) for x_RH in torch.split(x_NH, list(runs) or [x_NH.shape[0]])])


def banks(store: ExpertStore) -> list[SlotBank]:
    part_bytes = int(0.5 * store.manifest.record_bytes)
    opened = [
        open_bank(store, num_slots=1, device="cpu"),
        open_bank(store, num_slots=1, device="emulated", link_gbps=100.0),
        open_bank(store, num_slots=1, device="cpu", budget_bytes=part_bytes),
    ]
    if torch.cuda.is_available():
        opened.append(open_bank(store, num_slots=1, device="cuda"))
    return opened


@pytest.mark.parametrize("family", FAMILIES)
def test_every_bank_of_every_family_computes_each_run_as_if_it_were_alone(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_blocks, "BLOCK_BYTES", 4096)  # several blocks, the last one shorter
    store = ExpertStore.open(tiny_store(family, tmp_path), verify=False)
    for bank in banks(store):
        bank.load(0, 1, 2)
        for runs in RUNS:
            x_NH = random_rows(store, runs)
            assert torch.equal(bank.rows(0, x_NH, runs), alone(bank, x_NH, runs)), (type(bank).__name__, runs)
            if isinstance(bank, EmulatedBank):
                assert torch.equal(bank.rows_on_arrival(0, x_NH, runs)[0], alone(bank, x_NH, runs)), runs


@pytest.mark.parametrize("agree", [True, False])
def test_runs_are_right_whether_or_not_blocks_agree_on_this_machine(
    store: ExpertStore, monkeypatch: pytest.MonkeyPatch, agree: bool
) -> None:
    monkeypatch.setattr(by_blocks, "BLOCK_BYTES", 4096)
    if not agree:
        monkeypatch.setattr(by_blocks, "_agree", lambda *shape, num_threads: False)
    maths = ExpertMaths(store.manifest)
    fields = store.fields(store.record(0, 3))
    maths.prepare_for_runs(fields)
    assert maths._by_blocks == (frozenset(("gate_up_proj", "down_proj")) if agree else frozenset())
    x_NH = random_rows(store, (1,) * 5)
    expected_NH = torch.cat([maths.rows(fields, x_1H) for x_1H in torch.split(x_NH, 1)])
    assert torch.equal(maths.rows(fields, x_NH, (1,) * 5), expected_NH)


def test_no_machine_is_trusted_whose_blocks_round_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows in one product is what it must not come to; on a machine where even that agrees there is no harm."""
    weight_MK = torch.randn(512, 256, generator=torch.Generator().manual_seed(1))
    x_RK = torch.randn(4, 256, generator=torch.Generator().manual_seed(2))
    together_RM = torch.nn.functional.linear(x_RK, weight_MK)
    same = torch.equal(
        together_RM, torch.cat([torch.nn.functional.linear(x_1K, weight_MK) for x_1K in torch.split(x_RK, 1)])
    )
    monkeypatch.setattr(by_blocks, "_each_row", torch.nn.functional.linear)
    by_blocks._agree.cache_clear()
    try:
        assert by_blocks.blocks_agree(weight_MK) is same
    finally:
        by_blocks._agree.cache_clear()


@pytest.mark.parametrize("together", [True, False])
def test_rows_of_fewer_bits_get_the_bits_of_each_alone(
    store: ExpertStore, monkeypatch: pytest.MonkeyPatch, together: bool
) -> None:
    assert not by_blocks.blocks_agree(torch.zeros(64, 64, dtype=torch.bfloat16))
    if not together:
        monkeypatch.setattr(by_blocks, "_agree_together", lambda *shape, most, has_bias, num_threads: False)
    maths = ExpertMaths(store.manifest)
    fields = {name: field.to(torch.bfloat16) for name, field in store.fields(store.record(0, 3)).items()}
    maths.prepare_for_runs(fields)
    assert together or not maths._together
    for runs in ((1,) * 3, (1,) * 40, (11, 7, 20), (3, 50, 2, 9), (33, 33), (64, 1)):
        x_NH = random_rows(store, runs, dtype=torch.bfloat16)
        expected_NH = torch.cat([maths.rows(fields, x_RH) for x_RH in torch.split(x_NH, list(runs))])
        assert torch.equal(maths.rows(fields, x_NH, runs), expected_NH), runs


def test_no_machine_is_trusted_whose_rows_round_otherwise_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product of several rows that adds in another order, as it does in other shapes, must be noticed although the
    result has few bits."""
    weight_MK = torch.zeros(768, 512, dtype=torch.bfloat16)  # of few numbers few would show it

    def halves(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, most: int) -> Tensor:
        parts = zip(x.float().chunk(2, -1), weight.float().chunk(2, -1), strict=True)
        first, second = (part @ half.T for part, half in parts)
        return (first + second).bfloat16()

    by_blocks._agree_together.cache_clear()
    monkeypatch.setattr(by_blocks, "linear_together", halves)
    try:
        assert not by_blocks.rows_agree(weight_MK)
    finally:
        by_blocks._agree_together.cache_clear()


def test_rows_are_never_tried_together_in_full_precision() -> None:
    assert not by_blocks.rows_agree(torch.zeros(64, 64))
    assert by_blocks.most_together(torch.zeros(64, 64)) == 1


def test_short_runs_share_products_and_long_ones_stay_alone() -> None:
    """Counted in calls: what a run costs beyond its share of a product is the weight coming from memory again."""
    shapes: list[tuple[str, int]] = []
    weight_MK = torch.ones(4, 8)

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        shapes.append(("together", len(x)))
        return x @ weight.T

    def alone(x: Tensor) -> Tensor:
        shapes.append(("alone", len(x)))
        return x @ weight_MK.T

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", linear)
        x_NK = torch.arange(62.0)[:, None].expand(62, 8)
        found_NM = by_blocks.linear_of_runs(x_NK, weight_MK, (10, 9, 8, 7, 17, 2, 9), most=16, alone=alone)
    assert shapes == [("together", 16), ("together", 16), ("together", 2), ("alone", 17), ("together", 11)]
    assert torch.equal(found_NM, x_NK @ weight_MK.T)


def test_slices_of_an_expert_are_brought_once_for_all_runs(store: ExpertStore) -> None:
    bank = open_bank(store, num_slots=1, device="cpu", budget_bytes=int(0.4 * store.manifest.record_bytes))
    assert isinstance(bank, SlicedBank)
    bank.load(0, 0, 1)
    brought: list[int] = []
    bring = bank._carrier.bring
    bank._carrier.bring = lambda place, sources, *, stop=None: (  # type: ignore[method-assign]
        brought.append(place) or bring(place, sources, stop=stop)  # type: ignore[func-returns-value]
    )
    x_NH = random_rows(store, (1, 1, 1))
    bank.rows(0, x_NH)
    in_one, brought[:] = list(brought), []
    bank.load(0, 0, 1)
    brought.clear()
    bank.rows(0, x_NH, (1, 1, 1))
    assert brought == in_one


@given(runs=st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=6))
def test_runs_are_told_apart_by_expert(runs: list[list[int]]) -> None:
    experts = list(range(len(runs)))[::-1]
    message = Compute(
        request_id=1,
        spans=[Span(1, 0)],
        layer=0,
        experts=experts,
        counts=[sum(of_expert) for of_expert in runs],
        ttl_s=1.0,
        runs=[run for of_expert in runs for run in of_expert],
    )
    assert runs_of(message) == {expert: tuple(of) for expert, of in zip(experts, runs, strict=True)}


def test_without_runs_an_experts_rows_are_one() -> None:
    message = Compute(request_id=1, spans=[Span(1, 0)], layer=0, experts=[5, 2], counts=[3, 1], ttl_s=1.0)
    assert runs_of(message) == {5: (3,), 2: (1,)}


@given(compute=st.lists(st.integers(1, 9), min_size=1, max_size=5), more=st.lists(st.integers(1, 9), max_size=5))
def test_more_rows_or_runs_are_taken_to_be_dearer(compute: list[int], more: list[int]) -> None:
    pace = Pace()
    pace.took(compute, 0.1)
    bounds_s = [pace.at_most_s(compute + more[:number]) for number in range(len(more) + 1)]
    assert bounds_s[0] == 0.1
    assert all(fewer_s <= more_s for fewer_s, more_s in pairwise(bounds_s))
    assert pace.at_most_s([1] * (2 * len(compute))) >= 0.2
