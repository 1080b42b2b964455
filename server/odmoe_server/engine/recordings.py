"""What a running engine may write down on the side: a timeline, a routing trace, spans. Off unless somebody says where
to."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from odmoe_model.manifest import Manifest
from odmoe_model.trace import VERSION, TraceHeader
from odmoe_server.cluster.timeline import Mark, Timeline
from odmoe_server.cluster.timeline_file import record_timeline
from odmoe_server.moe.trace import RoutedCall, record_trace
from odmoe_server.recording import Recorder, Sink


@dataclass(frozen=True, kw_only=True)
class Recordings:
    """`timeline` and `trace` are None where nothing is to be recorded."""

    timeline: Timeline | None = None
    trace: Callable[[RoutedCall], None] | None = None
    recorders: tuple[Recorder[Any], ...] = ()

    @classmethod
    def open(
        cls,
        manifest: Manifest,
        *,
        timeline_file: Path | None,
        trace_file: Path | None,
        spans: Sink[Mark] | None = None,
    ) -> "Recordings":
        """Make the files that are named; what the timeline is drawn from also goes to `spans`. Raises ValueError when a
        file cannot be made."""
        if timeline_file is not None and timeline_file == trace_file:
            raise ValueError(f"timeline and trace cannot both be {trace_file}: give each a file of its own")
        recorders: list[Recorder[Any]] = []
        timeline: Timeline | None = None
        trace: Callable[[RoutedCall], None] | None = None
        if timeline_file is not None:
            facts = {"model_type": manifest.model_type, "store_digest": manifest.digest, "odmoe": version("odmoe")}
            timeline, drawer = record_timeline(timeline_file, num_layers=manifest.num_moe_layers, facts=facts)
            recorders.append(drawer)
        if spans is not None:
            sender: Recorder[Mark] = Recorder(spans, name="the traces")
            timeline = also(timeline, sender.put)
            recorders.append(sender)
        if trace_file is not None:
            tracer = record_trace(trace_file, header_of(manifest))
            trace = tracer.put
            recorders.append(tracer)
        return cls(timeline=timeline, trace=trace, recorders=tuple(recorders))

    def start(self) -> None:
        """Begin to write."""
        for recorder in self.recorders:
            recorder.start()

    def close(self) -> None:
        """Write what is left."""
        for recorder in self.recorders:
            recorder.close()


def also(timeline: Timeline | None, put: Callable[[Mark], None]) -> Timeline:
    """A timeline whose marks go to one more."""
    if timeline is None:
        return Timeline(put, time.monotonic)
    before = timeline.put

    def both(mark: Mark) -> None:
        before(mark)
        put(mark)

    return Timeline(both, timeline.clock)


def header_of(manifest: Manifest) -> TraceHeader:
    """The first line of a trace of this model."""
    return TraceHeader(
        odmoe_trace=VERSION,
        model_type=manifest.model_type,
        store_digest=manifest.digest,
        num_layers=manifest.num_moe_layers,
        num_experts=manifest.num_experts,
        top_k=manifest.top_k,
        package_version=version("odmoe"),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
