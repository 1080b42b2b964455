"""What happens to a node (events) and what it decides to do about it (actions). Data only.

Knows the wire's messages, which are part of both; knows nothing of sockets, threads, tensors or clocks.
Token rows never pass through here: the driver keeps them beside the request they came with.
"""

from dataclasses import dataclass
from typing import NamedTuple

from odmoe_wire.messages import (
    Cancel,
    Compute,
    ComputeFailed,
    Load,
    Loaded,
    LoadFailed,
    Release,
    Result,
    Rollback,
    Schedule,
    View,
    Welcome,
    Withdraw,
)


class ExpertKey(NamedTuple):
    """One expert of one MoE layer (both ordinals, 0-based)."""

    layer: int
    expert: int


# ----------------------------------------------------------------------------------------------------- events

Order = Welcome | View | Schedule | Rollback | Load | Compute | Release | Cancel | Withdraw


@dataclass(frozen=True, slots=True)
class Told:
    """A peer's message. `epoch` is its envelope's."""

    message: Order
    epoch: int


@dataclass(frozen=True, slots=True)
class LoadDone:
    """The bytes are in the slot; they took `load_s` to get there. `ended_s` is when, on the agent's clock."""

    slot: int
    load_s: float
    ended_s: float


@dataclass(frozen=True, slots=True)
class LoadBroke:
    """The load of the slot ended without the expert."""

    slot: int
    reason: str


@dataclass(frozen=True, slots=True)
class LoadStopped:
    """The load of the slot was broken off, `load_s` after it began."""

    slot: int
    load_s: float


@dataclass(frozen=True, slots=True)
class ComputeDone:
    """The slot's expert was computed for the request. `waited_s`: how long that waited for bytes, beside."""

    slot: int
    compute_s: float
    waited_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ComputeBroke:
    """The slot's expert could not be computed for the request."""

    slot: int
    reason: str


@dataclass(frozen=True, slots=True)
class ServerLost:
    """The server is gone, has said bye, or was replaced: nobody wants anything of this node any more."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = Told | LoadDone | LoadBroke | LoadStopped | ComputeDone | ComputeBroke | ServerLost | Tick

# ---------------------------------------------------------------------------------------------------- actions


@dataclass(frozen=True, slots=True)
class StartLoad:
    """Load the expert into the slot; answer with `LoadDone`, `LoadBroke` or, if told so, `LoadStopped`."""

    slot: int
    key: ExpertKey


@dataclass(frozen=True, slots=True)
class BreakOff:
    """Stop the load of the slot as soon as can be; if it has come to its end by then, that is as well."""

    slot: int


@dataclass(frozen=True, slots=True)
class StartCompute:
    """Compute the slot's expert on the request's rows; answer with `ComputeDone` or `ComputeBroke`. `on_arrival`: its
    load is under way, and that has an end of its own."""

    slot: int
    key: ExpertKey
    request_id: int
    on_arrival: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """End of a request: send the message (a `Result` with its rows) to the server, then forget the rows."""

    message: Result | ComputeFailed


@dataclass(frozen=True, slots=True)
class Forget:
    """End of a request nobody waits for any more: forget its rows, send nothing."""

    request_id: int


@dataclass(frozen=True, slots=True)
class Tell:
    """News for the server that end no request."""

    message: LoadFailed


@dataclass(frozen=True, slots=True)
class Mention:
    """News for the server that nothing depends on: to be sent along with the next answer or life sign."""

    message: Loaded
    ended_s: float


Action = StartLoad | BreakOff | StartCompute | Answer | Forget | Tell | Mention
