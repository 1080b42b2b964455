"""One expert in slices along its intermediate dimension: where a slice lies in the record, and what it computes.

Each column of the intermediate dimension has a part in the sum that the down projection makes, so an expert's output
is the sum of what its slices give, and a device need hold but one of them at a time. Knows no slots, budgets of nodes
or threads. The sum is made in another order than the whole expert makes it: equal within rounding, not to the bit.

Shape suffixes: N rows of one expert, H hidden size, I intermediate size, G gate and up together (2I, or I), W columns
of one slice.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from odmoe_model.experts import ExpertMaths
from odmoe_model.manifest import Manifest, RecordField, plan_record

MOST_SLICES = 64
"""A budget that needs more than these is refused: each slice would cost more to order than to load."""


@dataclass(frozen=True, slots=True)
class Strip:
    """The part of a field that a slice of W columns has: along `dim`, `times` W entries from `first` on."""

    field: RecordField
    dim: int
    first: int = 0
    times: int = 1

    def cut(self, fields: Mapping[str, Tensor], start: int, stop: int) -> Tensor:
        length = self.times * (stop - start)
        return fields[self.field.name].narrow(self.dim, self.first + self.times * start, length)

    def shape(self, width: int) -> tuple[int, ...]:
        shape = self.field.shape
        return (*shape[: self.dim], self.times * width, *shape[self.dim + 1 :])


@dataclass(frozen=True, slots=True)
class SlicePlan:
    """How an expert visits a device in slices: the bounds of each, and the room there is. `num_buffers` is 2 where a
    slice can come while another is computed. `fixed_bytes` is what all slices need and stays there."""

    bounds: tuple[tuple[int, int], ...]
    num_buffers: int
    slice_bytes: int
    fixed_bytes: int

    @property
    def arena_bytes(self) -> int:
        return self.num_buffers * self.slice_bytes + self.fixed_bytes


class SlicedMaths:
    """What a slice of an expert of the store's family does to rows. Raises ValueError for a family whose experts are
    no sums over their intermediate dimension, or keep it where this module does not look."""

    def __init__(self, manifest: Manifest) -> None:
        self._maths = ExpertMaths(manifest)
        fields = {field.name: field for field in manifest.record}
        self.intermediate_size = self._check_shapes(fields, manifest)
        self._ups, self._up_biases, self._down = self._strips(fields)
        self._fixed = [fields["down_proj_bias"]] if self._maths.experts.has_bias else []
        self._check_gate(manifest.model_type)

    def cut(self, fields: Mapping[str, Tensor], start: int, stop: int) -> list[Tensor]:
        """The slice of columns `start` to `stop`: one view of the fields for each strip, as `rows` takes them."""
        return [strip.cut(fields, start, stop) for strip in self._all_strips()]

    def fixed(self, fields: Mapping[str, Tensor]) -> list[Tensor]:
        """What is added once to the sum of all slices: the down projection's bias, if there is one."""
        return [fields[field.name] for field in self._fixed]

    def rows(self, parts: Sequence[Tensor], x_NH: Tensor) -> Tensor:
        """What the slice whose strips are `parts` adds to the output, [N, H]."""
        ups = parts[: len(self._ups)]
        biases: Sequence[Tensor | None] = parts[len(self._ups) : -1] or [None] * len(self._ups)
        h = [self._maths.linear(x_NH, weight, bias) for weight, bias in zip(ups, biases, strict=True)]
        h_NW = self._maths.activate(h[0] if len(h) == 1 else torch.cat(h, dim=-1))
        return self._maths.linear(h_NW, parts[-1], None)

    def plan(self, budget_bytes: int) -> SlicePlan:
        """The fewest slices that fit the budget, two at a time where that takes no more than `MOST_SLICES`. Raises
        ValueError, with the bytes that are needed, if even that many are too large."""
        fixed_bytes = plan_record([(field.name, field.dtype, field.shape) for field in self._fixed])[1]
        for num_buffers in (2, 1):
            for num_slices in range(num_buffers, MOST_SLICES + 1):
                width = -(-self.intermediate_size // num_slices)
                slice_bytes = self._slice_bytes(width)
                if fixed_bytes + num_buffers * slice_bytes <= budget_bytes:
                    starts = range(0, self.intermediate_size, width)
                    bounds = tuple((start, min(start + width, self.intermediate_size)) for start in starts)
                    return SlicePlan(bounds, num_buffers, slice_bytes=slice_bytes, fixed_bytes=fixed_bytes)
        need_bytes = fixed_bytes + self._slice_bytes(-(-self.intermediate_size // MOST_SLICES))
        raise ValueError(
            f"a budget of {budget_bytes} bytes holds no slice of an expert: one of at most {MOST_SLICES} slices takes "
            f"{need_bytes} bytes; give at least --memory-mb {-(-need_bytes // 1_000_000)}"
        )

    def _slice_bytes(self, width: int) -> int:
        """Room for a slice of that many columns, each strip aligned."""
        strips = self._all_strips()
        return plan_record([(strip.field.name, strip.field.dtype, strip.shape(width)) for strip in strips])[1]

    def _all_strips(self) -> list[Strip]:
        return [*self._ups, *self._up_biases, self._down]

    def _strips(self, fields: Mapping[str, RecordField]) -> tuple[list[Strip], list[Strip], Strip]:
        """Of the up projection (its gate's part first where the two are concatenated), of its bias, and of the down
        projection."""
        experts, name = self._maths.experts, self._maths.up_name
        up_dim, down_dim = (1, 0) if experts.is_transposed else (0, 1)

        def ups(field: RecordField, dim: int) -> list[Strip]:
            if not experts.has_gate:
                return [Strip(field, dim)]
            if experts.is_concatenated:
                return [Strip(field, dim), Strip(field, dim, first=self.intermediate_size)]
            return [Strip(field, dim, times=2)]

        biases = ups(fields[f"{name}_bias"], 0) if experts.has_bias else []
        return ups(fields[name], up_dim), biases, Strip(fields["down_proj"], down_dim)

    def _check_shapes(self, fields: Mapping[str, RecordField], manifest: Manifest) -> int:
        """The intermediate size, if the record is what `_strips` takes it for."""
        experts, name, size = self._maths.experts, self._maths.up_name, manifest.hidden_size
        down = fields["down_proj"].shape if "down_proj" in fields else ()
        intermediate = down[0 if experts.is_transposed else -1] if len(down) == 2 else 0
        up_size = intermediate * (2 if experts.has_gate else 1)
        expected: dict[str, tuple[int, ...]] = {name: (up_size, size), "down_proj": (size, intermediate)}
        if experts.is_transposed:
            expected = {field: shape[::-1] for field, shape in expected.items()}
        if experts.has_bias:
            expected |= {f"{name}_bias": (up_size,), "down_proj_bias": (size,)}
        found = {field.name: field.shape for field in fields.values()}
        if found != expected:
            raise ValueError(
                f"experts of {manifest.model_type} cannot be served in slices: their parameters are {found}, not "
                f"{expected}; give the node room for a whole expert of {manifest.record_bytes} bytes"
            )
        return intermediate

    def _check_gate(self, family: str) -> None:
        """See that activating a slice gives the slice of what activating the whole gives."""
        start, size = self.intermediate_size // 3, self.intermediate_size
        up = self._ups[0].field
        up_size = size * (2 if self._maths.experts.has_gate else 1)
        h_NG = 3 * torch.sin(1.7 * torch.arange(2.0 * up_size)).view(2, up_size)
        strips = [Strip(up, 1, first=strip.first, times=strip.times) for strip in self._ups]
        slice_NG = torch.cat([strip.cut({up.name: h_NG}, start, size) for strip in strips], dim=-1)
        whole_NI, part_NW = self._maths.activate(h_NG), self._maths.activate(slice_NG)
        if whole_NI.shape != (2, size) or not torch.allclose(part_NW, whole_NI[:, start:], rtol=1e-4, atol=1e-5):
            raise ValueError(
                f"experts of {family} cannot be served in slices: their activation takes columns together; give the "
                f"node room for a whole expert"
            )
