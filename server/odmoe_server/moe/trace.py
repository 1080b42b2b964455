"""Routing traces: which experts the gates chose, layer by layer, for those who study or train predictors.

A trace is a file of lines of JSON. The first line is a `TraceHeader`, every other a `Routing`, or an object that says
how many were dropped there because the disk did not keep up. It has no text and no token ids, and prompts are left
out: nearly every expert is active in them and nobody forecasts them.

T token rows of the step, K experts a token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec
from torch import Tensor

from odmoe_server.recording import CappedFile, Recorder
from odmoe_wire.messages import Span

VERSION: Final = 1
CAP_BYTES: Final = 256 * 2**20
DIGITS: Final = 6


class TraceHeader(msgspec.Struct, frozen=True, kw_only=True):
    """First line. `cap_bytes`: a file that would grow over it becomes FILE.1, in place of an older one, and begins
    anew, so a step may lie in two files. `fields` names what stands in the arrays that follow."""

    odmoe_trace: int
    model_type: str
    store_digest: str
    num_layers: int
    num_experts: int
    top_k: int
    package_version: str
    created: str
    cap_bytes: int = CAP_BYTES
    fields: tuple[str, ...] = ("spans", "layer", "experts_TK", "weights_TK", "forecast")


class Routing(msgspec.Struct, frozen=True, array_like=True):
    """One MoE layer of one decode step, in the order in which they were computed.

    `spans`: [sequence, position, length] of each run of new tokens, whose rows follow one another; sequences are
    numbered from 1 at each start of the server. `experts` and `weights` [T, K]: what the gate chose for each token,
    best first as the model's router has it, and the weights it gives them, to 6 digits. `forecast`: the experts the
    predictor had foretold for these spans and this layer when the gate spoke; None when nothing had come by then."""

    spans: list[Span]
    layer: int
    experts: list[list[int]]
    weights: list[list[float]]
    forecast: list[int] | None


class _Dropped(msgspec.Struct, frozen=True):
    dropped: int


class TraceError(ValueError):
    """A file is no trace this version can read."""


@dataclass(frozen=True, slots=True)
class Routed:
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

    def write(self, calls: Sequence[Routed], dropped: int) -> None:
        """Append calls. Raises OSError."""
        lines: list[Routing | _Dropped] = [call.routing() for call in calls]
        if dropped:
            lines.append(_Dropped(dropped))
        self._file.append(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))

    def close(self) -> None:
        """Nothing is appended any more."""
        self._file.close()


def record_trace(path: Path, header: TraceHeader) -> Recorder[Routed]:
    """A recorder of what the gates choose. Raises ValueError when the file cannot be made."""
    return Recorder(TraceFile(path, header), name=f"the trace {path}")


@dataclass(kw_only=True)
class TraceReader:
    """A trace to go through once or more. `dropped` counts what the last pass found missing."""

    path: Path
    header: TraceHeader
    dropped: int = 0

    @classmethod
    def open(cls, path: Path) -> "TraceReader":
        """Raises OSError, or TraceError when it is none or of another version."""
        with path.open("rb") as file:
            first = file.readline()
        try:
            header = msgspec.json.decode(first, type=TraceHeader)
        except msgspec.MsgspecError as error:
            raise TraceError(f"{path} is no routing trace: {error}") from None
        if header.odmoe_trace != VERSION:
            raise TraceError(f"{path} is a trace of version {header.odmoe_trace}; this is for version {VERSION}")
        return cls(path=path, header=header)

    def __iter__(self) -> Iterator[Routing]:
        """All routings in order. A last line that was not finished is left out. Raises TraceError on a bad line."""
        self.dropped = 0
        decoder, gap = msgspec.json.Decoder(Routing), msgspec.json.Decoder(_Dropped)
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1 or not line.endswith(b"\n"):
                    continue
                try:
                    if line.startswith(b"{"):
                        self.dropped += gap.decode(line).dropped
                        continue
                    routing = decoder.decode(line)
                except msgspec.MsgspecError as error:
                    raise TraceError(f"{self.path}, line {number}: {error}") from None
                self._check(routing, number)
                yield routing

    def steps(self) -> Iterator["TracedStep"]:
        """The routings step by step, as a predictor would have met them. Of a step at the edge of a file, or where
        something was dropped, some layers may be missing."""
        step: TracedStep | None = None
        for routing in self:
            spans = tuple(routing.spans)
            if step is None or step.spans != spans or routing.layer in step.layers:
                if step is not None:
                    yield step
                step = TracedStep(spans=spans)
            step.layers[routing.layer] = routing
        if step is not None:
            yield step

    def _check(self, routing: Routing, number: int) -> None:
        """That a line fits the header: whoever replays it indexes by what it says."""
        num_tokens = sum(span.length for span in routing.spans)
        chosen = [expert for row in routing.experts for expert in row] + (routing.forecast or [])
        widths = {len(row) for row in routing.experts} | {len(row) for row in routing.weights}
        fits = (
            0 <= routing.layer < self.header.num_layers
            and len(routing.experts) == len(routing.weights) == num_tokens
            and widths == {self.header.top_k}
            and all(0 <= expert < self.header.num_experts for expert in chosen)
        )
        if not fits:
            raise TraceError(f"{self.path}, line {number}: it does not fit the model the trace is of")


@dataclass(kw_only=True)
class TracedStep:
    """One step of the decode loop: layer -> its routing, layers ascending."""

    spans: tuple[Span, ...]
    layers: dict[int, Routing] = field(default_factory=dict)
