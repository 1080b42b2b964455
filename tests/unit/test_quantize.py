"""The int8 weight: how far off, how many bytes, on which path; and that no weight of a model goes unmentioned."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from odmoe_model.family import experts_modules
from odmoe_model.quantize import (
    KERNEL_MAX_ROWS,
    Int8Weight,
    QuantizationReport,
    QuantizedLinear,
    merge,
    quantize_linears,
)
from support.tiny import FAMILIES, tiny_model


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_no_weight_is_off_by_more_than_half_a_step() -> None:
    weight_NK = random(40, 64) * torch.logspace(-6, 6, 40)[:, None]
    step_N1 = weight_NK.abs().amax(dim=1, keepdim=True) / 127
    error_NK = (Int8Weight(weight_NK).dequantized() - weight_NK).abs()
    # Rounding the scale to bfloat16 moves the outermost steps by up to 1/256 of the peak.
    assert bool((error_NK <= 1.01 * step_N1).all())
    assert error_NK.mean() < 0.3 * step_N1.mean()


def test_scale_has_no_factor_of_its_own_rounding() -> None:
    """A constant row comes back as itself up to the rounding of one bfloat16."""
    weight_NK = torch.full((1, 64), 0.777)
    assert torch.allclose(Int8Weight(weight_NK).dequantized(), weight_NK, rtol=2**-8)


def test_row_of_zeros_stays_zero() -> None:
    weight_NK = random(3, 32)
    weight_NK[1] = 0
    assert torch.equal(Int8Weight(weight_NK).dequantized()[1], torch.zeros(32))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weight_that_is_not_finite_is_refused(bad: float) -> None:
    weight_NK = random(3, 32)
    weight_NK[1, 5] = bad
    with pytest.raises(ValueError, match="not finite"):
        Int8Weight(weight_NK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_rows", [1, 3, KERNEL_MAX_ROWS, KERNEL_MAX_ROWS + 1, 40])
@pytest.mark.parametrize("num_inputs", [1, 8, 16, 20, 48, 64, 100])
def test_product_agrees_with_the_dequantised_weight(dtype: torch.dtype, num_rows: int, num_inputs: int) -> None:
    weight = Int8Weight(random(33, num_inputs))
    x_MK = random(num_rows, num_inputs, seed=1).to(dtype)
    expected_MN = x_MK.float() @ weight.dequantized().T
    got_MN = weight.linear(x_MK)
    assert got_MN.dtype == dtype
    assert (got_MN.float() - expected_MN).abs().max() <= 0.01 * expected_MN.abs().max()


@settings(max_examples=60, deadline=None)
@given(offset=st.integers(0, 40), step=st.integers(1, 2), num_rows=st.integers(1, 4), blocks=st.integers(1, 5))
def test_activations_may_lie_anywhere(offset: int, step: int, num_rows: int, blocks: int) -> None:
    """Views at any address and stride: the kernel itself crashes the process on most of them."""
    num_inputs = 16 * blocks
    flat = random(offset + num_rows * num_inputs * step).to(torch.bfloat16)
    x_MK = flat[offset:].view(num_rows, num_inputs * step)[:, ::step]
    weight = Int8Weight(random(5, num_inputs))
    expected_MN = x_MK.float() @ weight.dequantized().T
    assert torch.allclose(weight.linear(x_MK).float(), expected_MN, rtol=0.02, atol=0.02 * num_inputs)


def test_transposed_weight_is_taken_as_it_is_meant() -> None:
    weight_KN = random(32, 24)
    weight = Int8Weight(weight_KN.T)
    assert torch.allclose(weight.linear(torch.eye(32)).T, weight_KN.T, atol=0.03)
    assert weight.tensors()[0].untyped_storage().nbytes() == 32 * 24


def test_leading_dimensions_are_kept() -> None:
    assert Int8Weight(random(7, 16)).linear(random(2, 3, 16)).shape == (2, 3, 7)


def test_really_takes_a_quarter_of_fp32() -> None:
    model = nn.Sequential(nn.Linear(512, 1024, bias=False), nn.Linear(1024, 256))
    float_bytes = sum(module.weight.nbytes for module in model)
    (linears, biases) = quantize_linears(model, Int8Weight)
    held_bytes = sum(tensor.nbytes for module in model for tensor in module.quantized.tensors())
    assert linears.stored_bytes == linears.fp32_bytes == float_bytes
    assert linears.held_bytes == held_bytes < 0.252 * float_bytes
    assert biases.held_bytes == 4 * 256
    assert QuantizationReport((linears, biases)).ratio_to_fp32() == held_bytes / float_bytes


def test_linear_with_bias_agrees() -> None:
    linear = nn.Linear(48, 20)
    x = random(4, 48)
    with torch.no_grad():
        expected = linear(x)
        model = nn.Sequential(linear)
        quantize_linears(model, Int8Weight)
        assert (model(x) - expected).abs().max() < 0.02 * expected.abs().max() + 0.02


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_of_a_model_is_accounted_for(family: str) -> None:
    model = tiny_model(family).base_model
    for _, module in experts_modules(model):
        module.to("meta")
    tensors: dict[int, torch.Tensor] = {
        id(tensor): tensor for tensor in (*model.parameters(), *model.buffers()) if not tensor.is_meta
    }
    entries = quantize_linears(model, Int8Weight)
    assert sum(entry.weights for entry in entries) == sum(tensor.numel() for tensor in tensors.values())
    assert sum(entry.stored_bytes for entry in entries) == sum(tensor.nbytes for tensor in tensors.values())
    quantised = sum(entry.weights for entry in entries if entry.treatment == "int8")
    kept_matrices = {entry.what for entry in entries if entry.treatment == "kept" and entry.reason != "vectors"}
    assert quantised > 0
    assert kept_matrices <= {"embeddings", "routers and gates", "Conv1d weight"}


@pytest.mark.parametrize("family", FAMILIES)
def test_routers_and_gates_are_left_alone(family: str) -> None:
    model = tiny_model(family).base_model
    routers = {
        path: module
        for path, module in model.named_modules()
        if path.endswith(("mlp.gate", "mlp.router", ".router", "feed_forward.gate", "shared_expert_gate"))
    }
    quantize_linears(model, Int8Weight)
    assert routers
    for path, module in routers.items():
        assert model.get_submodule(path) is module
        assert not any(isinstance(each, QuantizedLinear) for each in module.modules())


def test_merging_adds_up_by_kind() -> None:
    model: Any = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 32))
    entries = quantize_linears(model, Int8Weight)
    assert merge(entries + entries)[0].weights == 2 * (16 * 16 + 16 * 32)
