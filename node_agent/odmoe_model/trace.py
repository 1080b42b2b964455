"""Routing traces: which experts the gates chose, layer by layer, for those who study or train predictors.

A trace is a file of lines of JSON. The first line is a `TraceHeader`, every other a `Routing`, or an object that says
how many were dropped there because the disk did not keep up. It has no text and no token ids, and prompts are left
out: nearly every expert is active in them and nobody forecasts them. The server writes them (`--trace`); here is the
format and who reads it back, and whatever a file says is checked first.

T token rows of the step, K experts a token.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from odmoe_wire.messages import Span

VERSION: Final = 1
CAP_BYTES: Final = 256 * 2**20
MAX_LINE_BYTES: Final = 2**24
# Of what a header may claim: readers make room by it.
MAX_LAYERS: Final = 1024
MAX_EXPERTS: Final = 4096


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


class Dropped(msgspec.Struct, frozen=True):
    """So many routings were not written here, because the disk did not keep up."""

    dropped: int


class TraceError(ValueError):
    """A file is no trace this version can read."""


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
            first = file.readline(MAX_LINE_BYTES)
        try:
            header = msgspec.json.decode(first, type=TraceHeader)
        except msgspec.MsgspecError as error:
            raise TraceError(f"{path} is no routing trace: {error}") from None
        if header.odmoe_trace != VERSION:
            raise TraceError(f"{path} is a trace of version {header.odmoe_trace}; this is for version {VERSION}")
        fits = 1 <= header.num_layers <= MAX_LAYERS and 1 <= header.top_k <= header.num_experts <= MAX_EXPERTS
        if not fits:
            raise TraceError(f"{path} is a trace of no model there can be: see its first line")
        return cls(path=path, header=header)

    def __iter__(self) -> Iterator[Routing]:
        """All routings in order. A last line that was not finished is left out. Raises TraceError on a bad line."""
        self.dropped = 0
        decoder, gap = msgspec.json.Decoder(Routing), msgspec.json.Decoder(Dropped)
        with self.path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b""), start=1):
                if len(line) == MAX_LINE_BYTES:
                    raise TraceError(f"{self.path}, line {number}: it is too long")
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
            and all(span.sequence >= 0 and span.position >= 0 and span.length >= 1 for span in routing.spans)
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
