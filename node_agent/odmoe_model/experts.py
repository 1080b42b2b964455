"""The mathematics of one expert, as its family's eager implementation does it. Knows no store and no slots.

Everything particular to a family (activation, gating, interleaving, transposition, bias) comes from its own
experts class in transformers, which is built on the meta device and lends its attributes; the weights come in
with each call. The order of operations is that of the classes' eager forward, so that equal rows give equal bits.

Shape suffixes: N rows of one expert, H hidden size, I intermediate size, G gate and up together (2I, or I).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from odmoe_model.family import build_config, experts_class
from odmoe_model.manifest import Manifest


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

    def rows(self, fields: Mapping[str, Tensor], x_NH: Tensor) -> Tensor:
        """The unweighted output [N, H] of the expert whose parameters are `fields` (see `record_fields`) for
        all the rows it has to do in this layer. To get eager's bits, give it the same rows in one call and as many
        threads: matrix products in float32 round by the shape and the split of the work."""
        return self.down(fields, self.up(fields, x_NH))

    def up(self, fields: Mapping[str, Tensor], x_NH: Tensor) -> Tensor:
        """The first stage of `rows`, [N, I]; needs no more than the first `up_bytes` of the record to be there."""
        return self.activate(self._project(x_NH, fields, self.up_name))

    def down(self, fields: Mapping[str, Tensor], h_NI: Tensor) -> Tensor:
        """The second stage of `rows`, which makes its result out of the first one's."""
        return self._project(h_NI, fields, "down_proj")

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

    def _project(self, x: Tensor, fields: Mapping[str, Tensor], name: str) -> Tensor:
        return self.linear(x, fields[name], fields[f"{name}_bias"] if self.experts.has_bias else None)
