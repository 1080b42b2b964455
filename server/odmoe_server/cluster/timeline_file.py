"""The file `--timeline` writes: events of a `Rendering` with a word on how they came about. Knows the file's form only.

Each write leaves whole JSON behind, so the file can be opened while the server runs, and after it was killed.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import msgspec

from odmoe_server.cluster.chrome_trace import Drawing, milliseconds
from odmoe_server.cluster.timeline import SERVER, Mark, Rendering, Timeline
from odmoe_server.recording import CappedFile, Recorder

CAP_BYTES: Final = 64 * 2**20
HOW: Final = (
    "All times are stamps of the server's own clock; clocks of two machines are never compared.",
    "server: from the gate's choice to the last row (experts), and the time between two such calls (own work).",
    "predictor: a layer's slice ends when its forecast reached the server and begins at the forecast before it, or, "
    "at a token's first layer, when the token was sent to the predictor, if that was later.",
    "node, load: ends when the node's word of it arrived and begins by the load's duration earlier. Loads that nobody "
    "wanted any more when they ended are not told of and not drawn.",
    "node, wait and compute: drawn backwards from the result's arrival by the durations it carries.",
    "node, send: from the request's departure to the first of these, so it holds both ways, there and back.",
)
PRECISION: Final = (
    "What a node or the predictor did appears later than it was, by the time its message took and the server's "
    "thread took to see it: for a result at most the way in ways_ms (there and back together); loads are shifted "
    "alike. Durations are the node's own and have no such error, except where cut_ms says that a slice was "
    "shortened so as not to overlap the one before it on its row."
)


class TimelineFile:
    """`facts` go into the file's metadata. Raises ValueError when the file cannot be made."""

    def __init__(
        self, path: Path, *, rendering: Rendering, facts: Mapping[str, Any], cap_bytes: int = CAP_BYTES
    ) -> None:
        self._rendering = rendering
        self._facts = facts
        self._cap_bytes = cap_bytes
        self._dropped = 0
        self._drawing = rendering.drawing
        self._drawing.row(SERVER, "step")
        self._drawing.take()  # names stand in the head
        self._file = CappedFile(path, cap_bytes=cap_bytes, head=self._head)
        self._file.append(b"", tail=self._tail())

    def write(self, marks: Sequence[Mark], dropped: int) -> None:
        """Draw what happened. Raises OSError."""
        self._dropped += dropped
        body = b"".join(b",\n" + msgspec.json.encode(event) for mark in marks for event in self._rendering.events(mark))
        self._file.append(body, tail=self._tail())

    def close(self) -> None:
        """It is whole already."""
        self._file.close()

    def _head(self) -> bytes:
        return b'{"traceEvents":[\n' + b",\n".join(msgspec.json.encode(event) for event in self._drawing.names)

    def _tail(self) -> bytes:
        ways = {
            node: {"requests": count, "shortest": milliseconds(shortest_s), "mean": milliseconds(sum_s / count)}
            for node, (shortest_s, count, sum_s) in self._rendering.ways_s.items()
        }
        about = {
            **self._facts,
            "how": HOW,
            "precision": PRECISION,
            "ways_ms": ways,
            "decode_totals": self._rendering.totals.summary(),
            "cap": f"{self._cap_bytes} bytes; what came before is in the file of this name with .1 at its end, and "
            "what came before that is gone",
            "marks_dropped": self._dropped,
        }
        return b'\n],\n"displayTimeUnit":"ms",\n"otherData":' + msgspec.json.encode(about) + b"}\n"


def record_timeline(
    path: Path, *, num_layers: int, facts: Mapping[str, Any], clock: Callable[[], float] = time.monotonic
) -> tuple[Timeline, Recorder[Mark]]:
    """What the server tells of, and the recorder that draws it into `path`. Raises ValueError."""
    rendering = Rendering(num_layers=num_layers, drawing=Drawing(origin_s=clock()))
    began = datetime.now(UTC).isoformat(timespec="milliseconds")
    file = TimelineFile(path, rendering=rendering, facts={**facts, "time_zero": began})
    recorder: Recorder[Mark] = Recorder(file, name=f"the timeline {path}")
    return Timeline(recorder.put, clock), recorder
