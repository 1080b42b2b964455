"""Slices of an expert add up to the expert: every family, widths that divide its intermediate size and others."""

from pathlib import Path

import msgspec
import pytest
import torch

from odmoe_model.experts import ExpertMaths
from odmoe_model.manifest import Manifest, RecordField
from odmoe_model.prepare import prepare
from odmoe_model.slices import MOST_SLICES, SlicedMaths
from odmoe_model.store import ExpertStore
from support.stores import tiny_store
from support.tiny import FAMILIES, tiny_model

WIDTHS = [1, 7, 16, 31, 96]


@pytest.fixture(scope="module", params=FAMILIES)
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ExpertStore:
    return ExpertStore.open(tiny_store(request.param, tmp_path_factory.mktemp(request.param)), verify=False)


def sum_of_slices(store: ExpertStore, width: int, x_NH: torch.Tensor) -> torch.Tensor:
    maths = SlicedMaths(store.manifest)
    fields = store.fields(store.record(1, 3))
    y_NH = torch.zeros(x_NH.shape)
    for start in range(0, maths.intermediate_size, width):
        y_NH += maths.rows(maths.cut(fields, start, min(start + width, maths.intermediate_size)), x_NH)
    for bias_H in maths.fixed(fields):
        y_NH += bias_H
    return y_NH.to(x_NH.dtype)


@pytest.mark.parametrize("width", WIDTHS)
def test_slices_add_up_to_the_expert(store: ExpertStore, width: int) -> None:
    x_NH = torch.randn(5, store.manifest.hidden_size, generator=torch.Generator().manual_seed(1))
    whole_NH = ExpertMaths(store.manifest).rows(store.fields(store.record(1, 3)), x_NH)
    torch.testing.assert_close(sum_of_slices(store, width, x_NH), whole_NH, rtol=1e-5, atol=1e-5)
    assert whole_NH.abs().mean() > 0.1, "nothing would be seen"


def test_the_intermediate_size_is_the_families_own(store: ExpertStore) -> None:
    maths, config = SlicedMaths(store.manifest), store.manifest.config
    assert maths.intermediate_size == config.get("moe_intermediate_size", config["intermediate_size"])


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_lower_precision_is_summed_in_float32(family: str, tmp_path: Path) -> None:
    tiny_model(family).to(torch.bfloat16).save_pretrained(tmp_path / "checkpoint")
    prepare(tmp_path / "checkpoint", tmp_path / "store")
    store = ExpertStore.open(tmp_path / "store", verify=False)
    x_NH = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    fields = store.fields(store.record(1, 3))
    whole_NH = ExpertMaths(store.manifest).rows(fields, x_NH)
    sliced_NH = sum_of_slices(store, 11, x_NH)
    assert sliced_NH.dtype == torch.bfloat16
    torch.testing.assert_close(sliced_NH, whole_NH, rtol=0.03, atol=0.03)


def test_a_plan_fits_its_budget_and_covers_every_column(store: ExpertStore) -> None:
    maths, record_bytes = SlicedMaths(store.manifest), store.manifest.record_bytes
    for budget_bytes in range(record_bytes // 12, record_bytes, record_bytes // 50):
        plan = maths.plan(budget_bytes)
        assert plan.arena_bytes <= budget_bytes
        assert [start for start, _ in plan.bounds] == [0, *(stop for _, stop in plan.bounds[:-1])]
        assert plan.bounds[-1][1] == maths.intermediate_size
        assert len(plan.bounds) <= MOST_SLICES
        assert plan.num_buffers == 2


def test_the_smallest_budget_has_one_buffer_and_less_is_refused_with_the_need(store: ExpertStore) -> None:
    maths = SlicedMaths(store.manifest)
    with pytest.raises(ValueError, match=r"one of at most 64 slices takes \d+ bytes; give at least --memory-mb 1"):
        maths.plan(1)
    need_bytes = next(size for size in range(0, 1 << 20, 64) if fits(maths, size))
    plan = maths.plan(need_bytes)
    assert (plan.num_buffers, plan.arena_bytes) == (1, need_bytes)
    with pytest.raises(ValueError, match=f"takes {need_bytes} bytes"):
        maths.plan(need_bytes - 1)


def fits(maths: SlicedMaths, budget_bytes: int) -> bool:
    try:
        maths.plan(budget_bytes)
    except ValueError:
        return False
    return True


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return ExpertStore.open(tiny_store("mixtral", tmp_path_factory.mktemp("m")), verify=False).manifest


def test_a_family_with_other_parameters_is_refused_by_name(mixtral: Manifest) -> None:
    norm = RecordField("inner_norm", "float32", (96,), 0)
    with pytest.raises(ValueError, match=r"experts of mixtral cannot be served in slices: .*inner_norm"):
        SlicedMaths(msgspec.structs.replace(mixtral, record=(*mixtral.record, norm)))


def test_a_family_whose_activation_takes_columns_together_is_refused_by_name(
    mixtral: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ExpertMaths, "activate", lambda self, h_NG: h_NG.chunk(2, dim=-1)[0].softmax(dim=-1))
    with pytest.raises(ValueError, match="mixtral cannot be served in slices: their activation takes columns together"):
        SlicedMaths(mixtral)


def test_a_family_that_lies_otherwise_than_it_says_is_refused(
    mixtral: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interleaved columns taken for concatenated ones would give wrong sums, not an error."""

    def interleaved(self: ExpertMaths, h_NG: torch.Tensor) -> torch.Tensor:
        return h_NG[..., ::2].sigmoid() * h_NG[..., 1::2]

    monkeypatch.setattr(ExpertMaths, "activate", interleaved)
    with pytest.raises(ValueError, match="mixtral cannot be served in slices"):
        SlicedMaths(mixtral)
