"""Weights in fewer bytes: an int8 weight with its matrix product, put in place of a model's linear layers.

Symmetric, one scale for each output row. Says of every weight whether it was quantised, kept or dropped, and why.
Knows nothing of stores and of who uses the quantised model.

Shape suffixes: M rows of activations, N outputs, K inputs.
"""

import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Final, Literal, Protocol

import torch
from torch import Tensor, nn

# Treatment of a weight: named after the precision, or left as it is, or not needed and given back.
Treatment = Literal["int8", "kept", "dropped"]

# torch's int8 kernel reads whole vectors of inputs: with other widths, or activations that start elsewhere, it gives
# rubbish or crashes the process (seen with torch 2.13 on AVX-512 and AVX2; tests/unit/test_quantize.py).
KERNEL_INPUTS: Final = 16
KERNEL_ALIGNMENT_BYTES: Final = 32
# Its time grows with the rows, that of one dequantisation does not; they met here for the widths measured.
KERNEL_MAX_ROWS: Final = 16
_INT8_MAX: Final = 127.0


class QuantizedWeight(Protocol):
    """The weight of a linear layer in fewer bytes."""

    treatment: Treatment

    def linear(self, x: Tensor) -> Tensor:
        """x [..., K] times the weight's transpose: [..., N] in the dtype of `x`, without bias."""
        ...

    def tensors(self) -> tuple[Tensor, ...]:
        """Everything it holds."""
        ...


# Makes a quantised weight of a floating-point one, [N, K], which it does not keep.
Quantizer = Callable[[Tensor], QuantizedWeight]


class Int8Weight:
    """Eight bits a weight and a bfloat16 scale an output row."""

    treatment: Treatment = "int8"

    def __init__(self, weight_NK: Tensor) -> None:
        """Quantise on the weight's own device. Raises ValueError for a weight that is not finite."""
        peak_N = weight_NK.abs().amax(dim=1).float()
        if not bool(torch.isfinite(peak_N).all()):
            raise ValueError("a weight is not finite; the checkpoint is damaged")
        # The scale is rounded before it is used, so that its rounding costs half a step and not a factor.
        self._scale_N = torch.where(peak_N > 0, peak_N / _INT8_MAX, 1.0).to(torch.bfloat16)
        steps_NK = weight_NK.float() / self._scale_N.float()[:, None]
        # A transposed view must not stay one: the kernel wants its rows in a row.
        self._steps_NK = steps_NK.round_().clamp_(-_INT8_MAX, _INT8_MAX).to(torch.int8).contiguous()
        self._use_kernel = _kernel_fits(self._steps_NK)

    def linear(self, x: Tensor) -> Tensor:
        """See `QuantizedWeight`. Where torch's kernel can be used the activations are rounded to bfloat16."""
        x_MK = x.reshape(-1, self._steps_NK.shape[1])
        y_MN = self._kernel(x_MK.to(torch.bfloat16)) if self._use_kernel else self._dequantized(x_MK)
        return y_MN.to(x.dtype).view(*x.shape[:-1], -1)

    def tensors(self) -> tuple[Tensor, ...]:
        """The steps, int8 [N, K], and the scales, bfloat16 [N]."""
        return self._steps_NK, self._scale_N

    def dequantized(self) -> Tensor:
        """The weight this stands for, float32 [N, K]."""
        return self._steps_NK.float() * self._scale_N.float()[:, None]

    def _kernel(self, x_MK: Tensor) -> Tensor:
        if x_MK.shape[0] > KERNEL_MAX_ROWS:
            return self._dequantized(x_MK)
        x_MK = x_MK.contiguous()
        if x_MK.data_ptr() % KERNEL_ALIGNMENT_BYTES:
            x_MK = x_MK.clone()
        return torch._weight_int8pack_mm(x_MK, self._steps_NK, self._scale_N)

    def _dequantized(self, x_MK: Tensor) -> Tensor:
        return nn.functional.linear(x_MK, self._steps_NK.to(x_MK.dtype)) * self._scale_N.to(x_MK.dtype)


class QuantizedLinear(nn.Module):
    """Stands where an `nn.Linear` stood. The bias stays as it was."""

    bias: Tensor | None

    def __init__(self, weight: QuantizedWeight, bias_N: Tensor | None) -> None:
        super().__init__()
        self.quantized = weight
        self.register_buffer("bias", bias_N, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        y = self.quantized.linear(x)
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True, kw_only=True)
class Treated:
    """What became of weights of one kind. `stored_bytes` as the checkpoint has them, `held_bytes` as measured on
    what is in memory now."""

    what: str
    treatment: Treatment
    reason: str
    weights: int
    stored_bytes: int
    held_bytes: int

    @property
    def fp32_bytes(self) -> int:
        return 4 * self.weights


@dataclass(frozen=True)
class QuantizationReport:
    """One entry for each kind of weight; together they cover the model."""

    entries: tuple[Treated, ...]

    @property
    def held_bytes(self) -> int:
        return sum(entry.held_bytes for entry in self.entries)

    @property
    def stored_bytes(self) -> int:
        return sum(entry.stored_bytes for entry in self.entries)

    def ratio_to_fp32(self) -> float:
        """Bytes held by the quantised weights over what they would take in float32."""
        quantised = [entry for entry in self.entries if entry.treatment not in ("kept", "dropped")]
        return sum(entry.held_bytes for entry in quantised) / max(1, sum(entry.fp32_bytes for entry in quantised))


def quantize_linears(model: nn.Module, quantize: Quantizer) -> list[Treated]:
    """Replace each linear layer inside the model, except routers and gates, one after the other; the float weight
    is let go of at once. The entries cover every parameter and buffer that is not on the meta device."""
    entries = []
    for path, module in list(model.named_modules()):
        if type(module) is not nn.Linear or _is_router(path, module) or module.weight.is_meta:
            continue
        quantised = quantize(module.weight.detach())
        parent_path, _, name = path.rpartition(".")
        bias = None if module.bias is None else module.bias.detach()
        setattr(model.get_submodule(parent_path), name, QuantizedLinear(quantised, bias))
        entries.append(treated_weight(module.weight, quantised, what="linear layers"))
    return merge(entries + [entry for entry in _kept(model) if entry is not None])


def treated_weight(weight: Tensor, quantised: QuantizedWeight, *, what: str) -> Treated:
    """The entry of one quantised weight; its bytes are those of the storages behind it."""
    held_bytes = sum(tensor.untyped_storage().nbytes() for tensor in quantised.tensors())
    return Treated(
        what=what,
        treatment=quantised.treatment,
        reason="",
        weights=weight.numel(),
        stored_bytes=weight.nbytes,
        held_bytes=held_bytes,
    )


def kept_tensor(tensor: Tensor, *, what: str, reason: str) -> Treated:
    """The entry of a tensor that stays as it is."""
    return Treated(
        what=what,
        treatment="kept",
        reason=reason,
        weights=tensor.numel(),
        stored_bytes=tensor.nbytes,
        held_bytes=tensor.nbytes,
    )


def merge(entries: Iterable[Treated]) -> list[Treated]:
    """One entry for each kind and treatment, in the order of their first appearance."""
    sums: dict[tuple[str, Treatment, str], tuple[int, int, int]] = {}
    for entry in entries:
        key = (entry.what, entry.treatment, entry.reason)
        weights, stored_bytes, held_bytes = sums.get(key, (0, 0, 0))
        sums[key] = (weights + entry.weights, stored_bytes + entry.stored_bytes, held_bytes + entry.held_bytes)
    return [
        Treated(
            what=what,
            treatment=treatment,
            reason=reason,
            weights=weights,
            stored_bytes=stored_bytes,
            held_bytes=held_bytes,
        )
        for (what, treatment, reason), (weights, stored_bytes, held_bytes) in sums.items()
    ]


def _kept(model: nn.Module) -> Iterable[Treated]:
    """Every tensor that is still there in full, shared ones once."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if tensor.is_meta or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            what, reason = _why_kept(path, module, name, tensor)
            yield kept_tensor(tensor, what=what, reason=reason)


def _why_kept(path: str, module: nn.Module, name: str, tensor: Tensor) -> tuple[str, str]:
    if isinstance(module, nn.Embedding):
        return "embeddings", "looked up, not multiplied"
    if _is_router(path, module):
        return "routers and gates", "they are the forecast, and small"
    if tensor.squeeze().ndim <= 1:
        return "norms, biases, tables", "vectors"
    return f"{type(module).__name__} {name}", "not a linear layer"


def _is_router(path: str, module: nn.Module) -> bool:
    """Whether the module decides between experts: the families' router classes, and gates of shared experts."""
    name = path.rpartition(".")[2]
    return "Router" in type(module).__name__ or name in ("gate", "router") or name.endswith("_gate")


def _kernel_fits(steps_NK: Tensor) -> bool:
    return steps_NK.device.type == "cpu" and steps_NK.shape[1] % KERNEL_INPUTS == 0 and _kernel_works()


@cache
def _kernel_works() -> bool:
    """Whether this machine's build of the kernel agrees with plain arithmetic; only x86 was ever tried."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    steps_NK = (torch.arange(48 * 64) % 255 - 127).to(torch.int8).view(48, 64)
    x_MK = torch.linspace(-1, 1, 2 * 64).to(torch.bfloat16).view(2, 64)
    got_MN = torch._weight_int8pack_mm(x_MK, steps_NK, torch.ones(48, dtype=torch.bfloat16)).float()
    expected_MN = x_MK.float() @ steps_NK.float().T
    return bool((got_MN - expected_MN).abs().max() <= 0.01 * expected_MN.abs().max())
