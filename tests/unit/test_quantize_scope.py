"""What of a model each precision and scope covers: every weight is in the report, and as many bytes as it says."""

from pathlib import Path

import pytest
import torch

from odmoe_model import seam
from odmoe_model.family import experts_modules
from odmoe_model.quantize import HalfWeight, QuantizedLinear
from odmoe_model.store import ExpertStore
from odmoe_predictor.config import Precision, Scope
from odmoe_predictor.process import QUANTIZERS
from odmoe_predictor.shadow import Shadow
from support.stores import local_model, tiny_store
from support.tiny import FAMILIES

PRECISIONS = pytest.mark.parametrize("precision", Precision.__args__)  # type: ignore[attr-defined]
SCOPES = pytest.mark.parametrize("scope", Scope.__args__)  # type: ignore[attr-defined]


@pytest.fixture(scope="module", params=FAMILIES)
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ExpertStore:
    return ExpertStore.open(tiny_store(request.param, tmp_path_factory.mktemp(request.param)), verify=False)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> ExpertStore:
    return ExpertStore.open(tiny_store("mixtral", tmp_path_factory.mktemp("scope")), verify=False)


@PRECISIONS
@SCOPES
def test_report_covers_the_whole_model(store: ExpertStore, precision: Precision, scope: Scope) -> None:
    report = Shadow.load(store, quantize=QUANTIZERS[precision], scope=scope).report
    model = local_model(store)
    in_model = {id(tensor): tensor.numel() for tensor in (*model.parameters(), *model.buffers())}
    assert sum(entry.weights for entry in report.entries) == sum(in_model.values())
    experts = [entry for entry in report.entries if entry.what == "experts"]
    assert [entry.is_quantised for entry in experts] == [True]
    assert {entry.reason for entry in report.entries if entry.treatment == "kept"} <= {
        "looked up, not multiplied",
        "they are the forecast, and small",
        "vectors",
        "not a linear layer",
        "not in the scope",
    }


def test_scope_of_experts_leaves_the_rest_in_full(store: ExpertStore) -> None:
    shadow = Shadow.load(store, quantize=QUANTIZERS["int4"], scope="experts")
    assert {entry.what for entry in shadow.report.entries if entry.is_quantised} == {"experts"}
    rest = [entry for entry in shadow.report.entries if not entry.is_quantised]
    assert all(entry.held_bytes == entry.stored_bytes for entry in rest)
    assert any(entry.reason == "not in the scope" for entry in rest)
    whole = Shadow.load(store, quantize=QUANTIZERS["int4"], scope="model")
    assert "not in the scope" not in {entry.reason for entry in whole.report.entries}
    assert whole.report.held_bytes < shadow.report.held_bytes


@SCOPES
def test_layers_that_are_replaced(mixtral: ExpertStore, scope: Scope) -> None:
    shadow = Shadow.load(mixtral, quantize=QUANTIZERS["nf4"], scope=scope)
    replaced = [module for module in shadow._body.modules() if isinstance(module, QuantizedLinear)]
    num_attention = 4 * mixtral.manifest.config["num_hidden_layers"]
    assert len(replaced) == (num_attention if scope == "model" else 0)


def test_one_token_is_summed_to_the_bit_as_several_are(mixtral: ExpertStore) -> None:
    """In bfloat16, where every addition rounds; the several are eager's way."""
    experts = Shadow.load(mixtral, quantize=lambda weight_NK: HalfWeight(weight_NK.bfloat16()))._experts
    module = experts_modules(local_model(mixtral))[0][1]
    generator = torch.Generator().manual_seed(0)
    for place in range(8):
        x_TH = torch.randn(1, mixtral.manifest.hidden_size, generator=generator).bfloat16()
        weight_TK = torch.rand(1, 2, generator=generator).bfloat16()
        index_TK = torch.tensor([[place, (place + 3) % 8]])
        call = seam.ExpertsCall(layer=0, module=module, x_TH=x_TH, index_TK=index_TK, weight_TK=weight_TK)
        groups = seam.group_rows(index_TK)
        outputs = {expert: experts._layers[0][expert].rows(module, x_TH) for expert in groups}
        assert torch.equal(experts(call), seam.combine(x_TH, weight_TK, groups, outputs))


def test_fewer_bits_take_fewer_bytes(tmp_path: Path) -> None:
    """At widths that need no filling up."""
    wide = tiny_store("mixtral", tmp_path, hidden_size=256, intermediate_size=512, num_hidden_layers=1)
    store = ExpertStore.open(wide, verify=False)
    held = [
        Shadow.load(store, quantize=QUANTIZERS[precision], scope="experts").report.ratio_to_fp32()
        for precision in ("fp16", "int8", "int4", "nf4")
    ]
    assert held == sorted(held, reverse=True)
    assert held[0] == 0.5
    assert held[2:] == [4.5 / 32, 4.25 / 32]
