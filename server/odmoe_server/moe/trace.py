"""Writing routing traces (`odmoe_model.trace` has the format): what the gates chose, made into lines off the loop.

T token rows of the step, K experts a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
from torch import Tensor

from odmoe_model.trace import Dropped, Routing, TraceHeader
from odmoe_server.recording import CappedFile, Recorder
from odmoe_wire.messages import Span

DIGITS: Final = 6


@dataclass(frozen=True, slots=True)
class RoutedCall:
    """What the gate chose, as the decode loop has it; made into a line later and elsewhere."""

    spans: tuple[Span, ...]
    layer: int
    index_TK: Tensor
    weight_TK: Tensor
    forecast: frozenset[int]

    def routing(self) -> Routing:
        """As it is written."""
        weights: list[list[float]] = self.weight_TK.tolist()
        return Routing(
            spans=list(self.spans),
            layer=self.layer,
            experts=self.index_TK.tolist(),
            weights=[[round(weight, DIGITS) for weight in row] for row in weights],
            forecast=sorted(self.forecast) or None,
        )


class TraceFile:
    """Writes a trace. Raises ValueError when the file cannot be made."""

    def __init__(self, path: Path, header: TraceHeader) -> None:
        head = msgspec.json.encode(header) + b"\n"
        self._file = CappedFile(path, cap_bytes=header.cap_bytes, head=lambda: head)

    def write(self, calls: Sequence[RoutedCall], dropped: int) -> None:
        """Append calls. Raises OSError."""
        lines: list[Routing | Dropped] = [call.routing() for call in calls]
        if dropped:
            lines.append(Dropped(dropped))
        self._file.append(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))

    def close(self) -> None:
        """Nothing is appended any more."""
        self._file.close()


def record_trace(path: Path, header: TraceHeader) -> Recorder[RoutedCall]:
    """A recorder of what the gates choose. Raises ValueError when the file cannot be made."""
    return Recorder(TraceFile(path, header), name=f"the trace {path}")
