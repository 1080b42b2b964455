"""The weights of 16 and of 4 bits: how far off, how many bytes, any shape, any address."""

import os
import platform
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from odmoe_model import quantize_half
from odmoe_model.blocks4 import CodedWeight
from odmoe_model.quantize import HalfWeight, Int4Weight, Nf4Weight, QuantizationReport, Quantizer, quantize_linears
from odmoe_model.quantize_nf4 import VALUES


def int4_plain(weight_NK: Tensor) -> Int4Weight:
    return Int4Weight(weight_NK, use_kernel=False)


FOUR_BITS = pytest.mark.parametrize("quantize", [Nf4Weight, Int4Weight, int4_plain])
ALL = pytest.mark.parametrize("quantize", [HalfWeight, Nf4Weight, Int4Weight, int4_plain])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dequantized(weight: object, num_inputs: int) -> Tensor:
    """The weight [N, K], read off its products with unit vectors."""
    return weight.linear(torch.eye(num_inputs)).T  # type: ignore[attr-defined,no-any-return]


def nearest(weight_NK: Tensor) -> Tensor:
    """nf4 by its definition: of each block of 64 the nearest of 16 values times the largest magnitude."""
    rows = []
    for row_K in weight_NK:
        for block_J in row_K.split(64):
            scale = block_J.abs().max().bfloat16().float()
            values = torch.tensor(VALUES) * scale
            rows.append(values[(block_J[:, None] - values).abs().argmin(dim=1)])
    return torch.cat(rows).view(weight_NK.shape)


def test_values_of_nf4_are_quantiles_of_the_normal_distribution() -> None:
    """Computed as the paper says, one half of the codes for each sign; 0.9677 is its outermost quantile."""
    normal = torch.distributions.Normal(0.0, 1.0)
    positive = normal.icdf(torch.linspace(0.9677083, 0.5, 9)[:-1])
    negative = -normal.icdf(torch.linspace(0.9677083, 0.5, 8)[:-1])
    expected = torch.cat([negative, torch.zeros(1), positive]).sort().values / positive.max()
    assert torch.allclose(torch.tensor(VALUES), expected, atol=1e-4)


@pytest.mark.parametrize("num_inputs", [1, 63, 64, 100, 192])
def test_nf4_takes_the_nearest_value(num_inputs: int) -> None:
    weight_NK = random(9, num_inputs) * torch.logspace(-4, 4, 9)[:, None]
    got_NK = Nf4Weight(weight_NK).dequantized().float()
    # Values and their product are rounded to bfloat16.
    assert torch.allclose(got_NK, nearest(weight_NK), rtol=2**-7)


@pytest.mark.parametrize("quantize", [Int4Weight, int4_plain])
@pytest.mark.parametrize("num_inputs", [32, 64, 100])
def test_int4_is_off_by_half_a_step_of_the_block(quantize: Quantizer, num_inputs: int) -> None:
    weight_NK = random(20, num_inputs) * torch.logspace(-4, 4, 20)[:, None] + 0.5
    step_N1 = (weight_NK.amax(dim=1, keepdim=True) - weight_NK.amin(dim=1, keepdim=True)) / 15
    error_NK = (dequantized(quantize(weight_NK), num_inputs) - weight_NK).abs()
    rounding_NK = 2**-7 * weight_NK.abs().amax(dim=1, keepdim=True)
    assert bool((error_NK <= 0.5 * step_N1 + rounding_NK).all())


@FOUR_BITS
@pytest.mark.parametrize("constant", [0.0, 0.75, -3.0])
def test_constant_block_comes_back(quantize: Quantizer, constant: float) -> None:
    weight_NK = torch.full((16, 64), constant)
    assert torch.equal(dequantized(quantize(weight_NK), 64), weight_NK)


@ALL
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weight_that_is_not_finite_is_refused(quantize: Quantizer, bad: float) -> None:
    weight_NK = random(3, 70)
    weight_NK[1, 66] = bad
    with pytest.raises(ValueError, match="not finite"):
        quantize(weight_NK)


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@settings(max_examples=25, deadline=None)
@given(
    num_outputs=st.integers(1, 70),
    num_inputs=st.integers(1, 200),
    num_rows=st.integers(1, 40),
    offset=st.integers(0, 9),
)
def test_any_shape_at_any_address(
    quantize: Quantizer, dtype: torch.dtype, num_outputs: int, num_inputs: int, num_rows: int, offset: int
) -> None:
    """The product is that with the weight it stands for; strides and addresses of the activations do not matter."""
    weight = quantize(random(num_outputs, num_inputs))
    x_MK = random(offset + 2 * num_rows * num_inputs, seed=1).to(dtype)[offset:].view(num_rows, 2 * num_inputs)[:, ::2]
    expected_MN = x_MK.float() @ dequantized(weight, num_inputs).T
    got_MN = weight.linear(x_MK)
    assert got_MN.dtype == dtype
    assert torch.allclose(got_MN.float(), expected_MN, rtol=0.02, atol=0.05 * num_inputs**0.5)


@ALL
def test_leading_dimensions_are_kept(quantize: Quantizer) -> None:
    weight = quantize(random(7, 16))
    assert weight.linear(random(2, 3, 16)).shape == (2, 3, 7)
    assert weight.linear(random(16)).shape == (7,)


@ALL
def test_transposed_weight_is_taken_as_it_is_meant(quantize: Quantizer) -> None:
    weight_KN = random(64, 48)
    weight = quantize(weight_KN.T)
    assert torch.equal(dequantized(weight, 64), dequantized(quantize(weight_KN.T.contiguous()), 64))
    assert sum(tensor.untyped_storage().nbytes() for tensor in weight.tensors()) <= 2 * 64 * 48


@pytest.mark.parametrize(
    ("quantize", "bits"), [(HalfWeight, 16), (Nf4Weight, 4 + 16 / 64), (Int4Weight, 4 + 32 / 64), (int4_plain, 4.5)]
)
def test_really_takes_that_many_bits(quantize: Quantizer, bits: float) -> None:
    model = nn.Sequential(nn.Linear(512, 1024, bias=False), nn.Linear(1024, 256, bias=False))
    (linears,) = quantize_linears(model, quantize)
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for module in model
        for tensor in module.quantized.tensors()
    }
    assert linears.held_bytes == sum(storages.values()) == bits / 8 * linears.weights
    assert QuantizationReport((linears,)).ratio_to_fp32() == bits / 32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_stay_as_they_are(dtype: torch.dtype) -> None:
    weight_NK = random(5, 24).to(dtype)
    weight = HalfWeight(weight_NK)
    (held_NK,) = weight.tensors()
    assert torch.equal(held_NK, weight_NK)
    assert held_NK.dtype == dtype
    assert held_NK.data_ptr() != weight_NK.data_ptr(), "a view would keep the store's file mapped"
    assert weight.treatment == {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]


@pytest.mark.parametrize(
    ("preferred", "peak", "treatment"),
    [(torch.float16, 1.0, "fp16"), (torch.bfloat16, 1.0, "bf16"), (torch.float16, 1e5, "bf16")],
)
def test_wider_weights_become_what_the_hardware_prefers(
    monkeypatch: pytest.MonkeyPatch, preferred: torch.dtype, peak: float, treatment: str
) -> None:
    monkeypatch.setattr(quantize_half, "preferred_dtype", lambda device: preferred)
    weight_NK = random(4, 16)
    weight_NK[2, 3] = peak
    weight = HalfWeight(weight_NK)
    assert weight.treatment == treatment
    assert torch.allclose(dequantized(weight, 16), weight_NK, rtol=2**-8)


@pytest.mark.parametrize(
    ("capabilities", "preferred"),
    [
        ({"avx2": True, "avx512_bf16": True, "architecture": "x86_64"}, torch.bfloat16),
        ({"avx2": True, "avx512_bf16": False, "architecture": "x86_64"}, torch.float16),
    ],
)
def test_processor_with_instructions_for_bfloat16_prefers_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, object], preferred: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    quantize_half.preferred_dtype.cache_clear()
    try:
        assert quantize_half.preferred_dtype(torch.device("cpu")) == preferred
    finally:
        quantize_half.preferred_dtype.cache_clear()


def test_large_weight_is_never_there_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    whole = CodedWeight.dequantized

    def watched(self: CodedWeight, first: int = 0, end: int | None = None) -> Tensor:
        part_NK = whole(self, first, end)
        sizes.append(part_NK.numel())
        return part_NK

    weight = Nf4Weight(random(5000, 1024))
    expected_N = weight.dequantized().float() @ random(1024, seed=1).bfloat16().float()
    monkeypatch.setattr(CodedWeight, "dequantized", watched)
    got_N = weight.linear(random(1024, seed=1))
    assert torch.allclose(got_N, expected_N, atol=0.02 * float(expected_N.abs().max()))
    assert len(sizes) > 1
    assert max(sizes) <= 2**21


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="only x86 has been tried")
@pytest.mark.parametrize("instructions", ["avx512", "avx2", "default"])
def test_kernel_of_int4_neither_crashes_nor_errs(instructions: str) -> None:
    """In a process of its own, with each of torch's builds of the kernel that this processor can run."""
    code = """
import torch
from odmoe_model.quantize import Int4Weight
torch.manual_seed(0)
for num_inputs in (32, 64, 96, 160, 256):
    for num_outputs in (16, 48, 64, 80):
        for num_rows in (1, 5, 40):
            for offset in (0, 1, 3):
                weight_NK = torch.randn(num_outputs, num_inputs)
                x = torch.randn(num_rows * num_inputs + offset, dtype=torch.bfloat16)[offset:].view(num_rows, -1)
                got = Int4Weight(weight_NK, use_kernel=True).linear(x).float()
                expected = Int4Weight(weight_NK, use_kernel=False).linear(x).float()
                assert (got - expected).abs().max() <= 0.03 * expected.abs().max()
"""
    env = {**os.environ, "ATEN_CPU_CAPABILITY": instructions, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=env)
