"""One call for a layer's experts as the decode loop holds it while the cluster works on it. Knows tensors;
knows no socket.

T token rows of the call, N rows of one expert, H hidden size.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from odmoe_server.cluster.events import LayerCall, PartDone
from odmoe_wire.messages import ExpertTiming


class CallError(Exception):
    """The cluster could not serve a call."""


@dataclass(kw_only=True)
class PendingCall:
    """Filled by the cluster's driver, awaited by the decode loop."""

    call: LayerCall
    rows: Mapping[int, torch.Tensor]  # expert -> x_NH
    predicted: frozenset[int] = frozenset()
    outputs: dict[int, torch.Tensor] = field(default_factory=dict)  # expert -> y_NH
    timings: list[ExpertTiming] = field(default_factory=list)
    failure: str | None = None
    done: bool = False

    def blob_rows(self, experts: list[int]) -> torch.Tensor:
        """The rows to send for some of the experts, in that order: [sum of their counts, H]."""
        if len(experts) == 1:
            return self.rows[experts[0]]
        return torch.cat([self.rows[expert] for expert in experts])

    def accept(self, part: PartDone, rows_NH: torch.Tensor) -> None:
        """Take the wanted experts' rows out of a result."""
        for expert, y_NH in zip(part.experts, torch.split(rows_NH, list(part.counts)), strict=True):
            if expert in part.wanted:
                self.outputs[expert] = y_NH
        self.timings.extend(timing for timing in part.timings if timing.expert in part.wanted)
        if part.last:
            self.done = True

    def fail(self, reason: str) -> None:
        """End the wait with an error."""
        self.failure = reason
        self.done = True
