"""A model's weights in fewer bytes: puts quantised weights in place of its linear layers.

Says of every weight whether it was quantised, kept or dropped, and why. Knows nothing of stores and of who uses the
quantised model; the precisions are in `quantize_half`, `quantize_int8`, `quantize_nf4` and `quantize_int4`.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from odmoe_model.quantize_half import HalfWeight
from odmoe_model.quantize_int4 import Int4Weight
from odmoe_model.quantize_int8 import KERNEL_MAX_ROWS, Int8Weight
from odmoe_model.quantize_nf4 import Nf4Weight
from odmoe_model.quantized_weight import QuantizedWeight, Quantizer, Treatment

__all__ = [
    "KERNEL_MAX_ROWS",
    "HalfWeight",
    "Int4Weight",
    "Int8Weight",
    "Nf4Weight",
    "QuantizationReport",
    "QuantizedLinear",
    "QuantizedWeight",
    "Quantizer",
    "Treated",
    "Treatment",
    "kept_tensor",
    "merge",
    "quantize_linears",
    "treated_weight",
]


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

    @property
    def is_quantised(self) -> bool:
        return self.treatment != "kept"


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
        quantised = [entry for entry in self.entries if entry.is_quantised]
        return sum(entry.held_bytes for entry in quantised) / max(1, sum(entry.fp32_bytes for entry in quantised))


def quantize_linears(model: nn.Module, quantize: Quantizer | None) -> list[Treated]:
    """Replace each linear layer inside the model, except routers and gates, one after the other; the float weight
    is let go of at once. Without a quantiser all stay. The entries cover every parameter and buffer that is not on
    the meta device."""
    if quantize is None:
        return merge(_kept(model))
    entries = []
    for path, module in list(model.named_modules()):
        if type(module) is not nn.Linear or _is_router(path, module) or module.weight.is_meta:
            continue
        quantised = quantize(module.weight.detach())
        parent_path, _, name = path.rpartition(".")
        bias = None if module.bias is None else module.bias.detach()
        setattr(model.get_submodule(parent_path), name, QuantizedLinear(quantised, bias))
        entries.append(treated_weight(module.weight, quantised, what="linear layers"))
    return merge(entries + list(_kept(model)))


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
    if type(module) is nn.Linear:
        return "linear layers", "not in the scope"
    return f"{type(module).__name__} {name}", "not a linear layer"


def _is_router(path: str, module: nn.Module) -> bool:
    """Whether the module decides between experts: the families' router classes, and gates of shared experts."""
    name = path.rpartition(".")[2]
    return "Router" in type(module).__name__ or name in ("gate", "router") or name.endswith("_gate")
