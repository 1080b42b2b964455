"""From what the timeline marks to what a trace tells: each step with its layers, each layer with what its nodes did.
Pure.

Knows marks and their stamps; knows no collector. Nothing here holds a token or a text.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from odmoe_server.cluster.timeline import Called, Heard, Mark, Stepped, Told
from odmoe_wire.messages import Compute, ComputeFailed, ExpertTiming, Result

MAX_OPEN: Final = 4096  # computes that may wait for their answer


@dataclass(frozen=True, kw_only=True)
class NodeWork:
    """One compute, from its departure to its answer; `failed` says why there was none. Times are the server's, those
    in `timings` the node's own durations."""

    node_id: str
    began_s: float
    ended_s: float
    experts: tuple[int, ...]
    timings: tuple[ExpertTiming, ...] = ()
    failed: str | None = None


@dataclass(frozen=True, kw_only=True)
class LayerWork:
    """From the gate's choice to the last row."""

    layer: int
    began_s: float
    ended_s: float
    experts: tuple[int, ...]
    predicted: frozenset[int]
    outcomes: Mapping[str, int]
    nodes: tuple[NodeWork, ...]


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """A step of the decode loop; `sequences` in their order, with the position and the tokens it took of each."""

    began_s: float
    ended_s: float
    is_prompt: bool
    sequences: Mapping[int, tuple[int, int]]
    layers: tuple[LayerWork, ...]


@dataclass(kw_only=True)
class Telling:
    """Marks in, in their order; a step out whenever one is whole."""

    _open: OrderedDict[int, Told] = field(default_factory=OrderedDict)
    _nodes: list[NodeWork] = field(default_factory=list)
    _layers: list[LayerWork] = field(default_factory=list)

    def heard(self, mark: Mark) -> StepWork | None:
        """The step that is over with this mark, if one is."""
        match mark:
            case Told(message=Compute(request_id=request_id)):
                self._open[request_id] = mark
                if len(self._open) > MAX_OPEN:
                    self._open.popitem(last=False)
            case Heard(message=Result(request_id=request_id, timings=timings)):
                self._close(request_id, mark.peer_id, mark.at_s, timings=tuple(timings))
            case Heard(message=ComputeFailed(request_id=request_id, code=code)):
                self._close(request_id, mark.peer_id, mark.at_s, failed=code)
            case Called():
                self._called(mark)
            case Stepped():
                return self._stepped(mark)
        return None

    def _close(
        self,
        request_id: int,
        peer_id: str,
        at_s: float,
        *,
        timings: tuple[ExpertTiming, ...] = (),
        failed: str | None = None,
    ) -> None:
        told = self._open.get(request_id)
        if told is None or told.peer_id != peer_id:
            return
        del self._open[request_id]
        assert isinstance(told.message, Compute)
        self._nodes.append(
            NodeWork(
                node_id=peer_id,
                began_s=told.at_s,
                ended_s=at_s,
                experts=tuple(told.message.experts),
                timings=timings,
                failed=failed,
            )
        )

    def _called(self, mark: Called) -> None:
        """What has no answer now was answered by another node, or left to it."""
        for request_id, told in list(self._open.items()):
            message = told.message
            assert isinstance(message, Compute)
            if message.layer == mark.call.layer and tuple(message.spans) == mark.call.spans:
                self._close(request_id, told.peer_id, mark.ended_s, failed="another node was first")
        outcomes = [timing.outcome for timing in mark.timings]
        self._layers.append(
            LayerWork(
                layer=mark.call.layer,
                began_s=mark.began_s,
                ended_s=mark.ended_s,
                experts=tuple(sorted(mark.call.counts)),
                predicted=mark.predicted,
                outcomes={outcome: outcomes.count(outcome) for outcome in ("hit", "late", "miss")},
                nodes=tuple(self._nodes),
            )
        )
        self._nodes.clear()

    def _stepped(self, mark: Stepped) -> StepWork:
        """Layers of a step that broke off before are left out."""
        layers = tuple(layer for layer in self._layers if layer.began_s >= mark.began_s)
        self._layers.clear()
        sequences: dict[int, tuple[int, int]] = {}
        for span in mark.spans:
            position, length = sequences.get(span.sequence, (span.position, 0))
            sequences[span.sequence] = min(position, span.position), length + span.length
        return StepWork(
            began_s=mark.began_s,
            ended_s=mark.ended_s,
            is_prompt=mark.is_prompt,
            sequences=sequences,
            layers=layers,
        )
