"""What can happen to the cluster (events) and what it decides to do (actions). Plain frozen data.

Knows the wire's messages; knows no socket, clock, thread or tensor. Expert rows never come here: a call is known by
its id and its row counts, the driver keeps the rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from odmoe_wire.messages import AnyMessage, Compute, ExpertRef, ExpertTiming, Span


@dataclass(frozen=True, kw_only=True)
class LayerCall:
    """The gate of one MoE layer has spoken: `counts` maps each chosen expert to its number of token rows. A prompt is
    not forecast; where it goes on behind these spans, `next_spans` is what the step after this one takes of it. `runs`
    cuts an expert's rows into those that belong together (see `Compute.runs`); without an entry all do. In mode
    "importance" the decode loop has also decided `where` each expert is computed and what is `leaving` which node."""

    call_id: int
    spans: tuple[Span, ...]
    layer: int
    counts: Mapping[int, int]
    is_prompt: bool = False
    next_spans: tuple[Span, ...] = ()
    runs: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    where: Mapping[int, str] = field(default_factory=dict)
    leaving: Mapping[str, tuple[ExpertRef, ...]] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------------ events


@dataclass(frozen=True, kw_only=True)
class CallRequested:
    """The decode loop asks for a layer's experts."""

    call: LayerCall


@dataclass(frozen=True, kw_only=True)
class PromptBegins:
    """The decode loop begins to take a prompt through the model, `spans` of it in the first step."""

    spans: tuple[Span, ...]


@dataclass(frozen=True, kw_only=True)
class FetchAhead:
    """The decode loop wants experts of a layer loaded before its gate has spoken for these spans; the rest as in
    `LayerCall`."""

    spans: tuple[Span, ...]
    layer: int
    where: Mapping[int, str]
    leaving: Mapping[str, tuple[ExpertRef, ...]]


@dataclass(frozen=True, kw_only=True)
class CallAbandoned:
    """The decode loop does not wait for this call any more; `late` if because of nodes that did not answer."""

    call_id: int
    late: bool = False


@dataclass(frozen=True, kw_only=True)
class SequenceEnded:
    """A sequence is over, finished or cancelled."""

    sequence: int


@dataclass(frozen=True, kw_only=True)
class PeerMessage:
    """A checked message came in from a peer."""

    peer_id: str
    epoch: int
    message: AnyMessage


@dataclass(frozen=True, kw_only=True)
class PeerUnreachable:
    """A send to the peer failed: no route, or its pipe is full."""

    peer_id: str


@dataclass(frozen=True, kw_only=True)
class TimePassed:
    """Nothing but the clock; comes several times a heartbeat, and so much later than it was to come."""

    late_s: float = 0.0


Event = (
    CallRequested
    | PromptBegins
    | FetchAhead
    | CallAbandoned
    | SequenceEnded
    | PeerMessage
    | PeerUnreachable
    | TimePassed
)


# ----------------------------------------------------------------------------------------------------- actions


@dataclass(frozen=True, kw_only=True)
class Send:
    """Send a message without blobs."""

    peer_id: str
    message: AnyMessage
    epoch: int


@dataclass(frozen=True, kw_only=True)
class SendCompute:
    """Send a compute; the driver adds the rows of `message.experts` of the call."""

    peer_id: str
    message: Compute
    epoch: int
    call_id: int


@dataclass(frozen=True, kw_only=True)
class PartDone:
    """The result now being handled brings the rows of `wanted` (a subset of `experts`, the others came earlier from
    another node); `experts` and `counts` tell how the rows lie. `last` when the call is complete."""

    call_id: int
    experts: tuple[int, ...]
    counts: tuple[int, ...]
    wanted: frozenset[int]
    timings: tuple[ExpertTiming, ...]
    last: bool


@dataclass(frozen=True, kw_only=True)
class CallFailed:
    """The call cannot be served; `reason` is for the log and names no internals a client must not see."""

    call_id: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Note:
    """Something a person should find in the log."""

    level: Literal["info", "warning"]
    text: str


Action = Send | SendCompute | PartDone | CallFailed | Note
