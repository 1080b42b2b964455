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
    """What one expert of the store's family does to rows."""

    def __init__(self, manifest: Manifest) -> None:
        config = build_config(manifest.config)
        with torch.device("meta"):
            self._experts: Any = experts_class(config)(config)
        assert not self._experts.has_post_expert_norm, "no supported family has a norm behind each expert"

    def rows(self, fields: Mapping[str, Tensor], x_NH: Tensor) -> Tensor:
        """The unweighted output [N, H] of the expert whose parameters are `fields` (see `record_fields`) for
        all the rows it has to do in this layer. To get eager's bits, give it the same rows in one call and as many
        threads: matrix products in float32 round by the shape and the split of the work."""
        up = "gate_up_proj" if self._experts.has_gate else "up_proj"
        h_NG = self._linear(x_NH, fields, up)
        h_NI = self._experts._apply_gate(h_NG) if self._experts.has_gate else self._experts.act_fn(h_NG)
        return self._linear(h_NI, fields, "down_proj")

    def _linear(self, x: Tensor, fields: Mapping[str, Tensor], name: str) -> Tensor:
        weight = fields[name]
        bias = fields[f"{name}_bias"] if self._experts.has_bias else None
        if not self._experts.is_transposed:
            return torch.nn.functional.linear(x, weight, bias)
        product = x @ weight
        # Not addmm: the eager classes multiply and add in two steps, which rounds differently.
        return product if bias is None else product + bias
