"""The mathematics of one expert, as its family's eager implementation does it. Knows no store and no slots.

Everything particular to a family (activation, gating, interleaving, transposition, bias) comes from its own
experts class in transformers, which is built on the meta device and lends its attributes; the weights come in
with each call. The order of operations is that of the classes' eager forward, so that equal rows give equal bits.
Rows may come in *runs*, so many rows of each, one behind the other: each run then gets the bits of a call of its own.

Shape suffixes: N rows of one expert, H hidden size, I intermediate size, G gate and up together (2I, or I).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from odmoe_model.family import build_config, experts_class
from odmoe_model.manifest import Manifest
from odmoe_model.runs import blocks_agree, linear_by_blocks, linear_of_runs, most_together


class ExpertMaths:
    """What one expert of the store's family does to rows. `experts` is the family's own module, without weights."""

    def __init__(self, manifest: Manifest) -> None:
        config = build_config(manifest.config)
        with torch.device("meta"):
            self.experts: Any = experts_class(config)(config)
        assert not self.experts.has_post_expert_norm, "no supported family has a norm behind each expert"
        self.up_name = "gate_up_proj" if self.experts.has_gate else "up_proj"
        in_up = {self.up_name, f"{self.up_name}_bias"}
        self.up_bytes = max(field.offset + field.size_bytes for field in manifest.record if field.name in in_up)
        # Of the weights' names: those by which runs of one row are multiplied block by block; and up to how many rows
        # of several runs in one product.
        self._by_blocks: frozenset[str] = frozenset()
        self._together: dict[str, int] = {}

    def prepare_for_runs(self, fields: Mapping[str, Tensor]) -> None:
        """Find out how short runs are best multiplied on this machine. Without this they are right as well."""
        if not (self.experts.is_transposed or self.experts.has_bias):
            names = (self.up_name, "down_proj")
            self._by_blocks = frozenset(name for name in names if blocks_agree(fields[name]))
            found = {name: most_together(fields[name]) for name in names}
            self._together = {name: most for name, most in found.items() if most > 1}

    def rows(self, fields: Mapping[str, Tensor], x_NH: Tensor, runs: Sequence[int] = ()) -> Tensor:
        """The unweighted output [N, H] of the expert whose parameters are `fields` (see `record_fields`) for
        all the rows it has to do in this layer. To get eager's bits, give it the same rows in one run and as many
        threads: matrix products in float32 round by the shape and the split of the work. No `runs`: one of all rows."""
        return self.down(fields, self.up(fields, x_NH, runs), runs)

    def up(self, fields: Mapping[str, Tensor], x_NH: Tensor, runs: Sequence[int] = ()) -> Tensor:
        """The first stage of `rows`, [N, I]; needs no more than the first `up_bytes` of the record to be there."""
        h_NG = self._project(x_NH, fields, self.up_name, runs)
        if len(runs) < 2:
            return self.activate(h_NG)
        # What is done element by element may be done otherwise for the last few, so not together either.
        return torch.cat([self.activate(run_NG) for run_NG in torch.split(h_NG, list(runs))])

    def down(self, fields: Mapping[str, Tensor], h_NI: Tensor, runs: Sequence[int] = ()) -> Tensor:
        """The second stage of `rows`, which makes its result out of the first one's."""
        return self._project(h_NI, fields, "down_proj", runs)

    def activate(self, h_NG: Tensor) -> Tensor:
        """What lies between the two projections."""
        h_NI: Tensor = self.experts._apply_gate(h_NG) if self.experts.has_gate else self.experts.act_fn(h_NG)
        return h_NI

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Rows times a weight that lies as the family lays it."""
        if not self.experts.is_transposed:
            return torch.nn.functional.linear(x, weight, bias)
        product = x @ weight
        # Not addmm: the eager classes multiply and add in two steps, which rounds differently.
        return product if bias is None else product + bias

    def _project(self, x: Tensor, fields: Mapping[str, Tensor], name: str, runs: Sequence[int]) -> Tensor:
        weight, bias = fields[name], fields[f"{name}_bias"] if self.experts.has_bias else None
        if len(runs) < 2:
            return self.linear(x, weight, bias)
        if (most := self._together.get(name, 1)) >= min(runs) and most > 1:
            alone = partial(self.linear, weight=weight, bias=bias)
            return linear_of_runs(x, weight, runs, most=most, alone=alone)
        if name in self._by_blocks and max(runs) == 1:
            return linear_by_blocks(x, weight)
        return torch.cat([self.linear(run, weight, bias) for run in torch.split(x, list(runs))])
