"""Every message of the protocol, by who receives it. Knows nothing of how they are encoded or carried.

Terms. `layer` is the ordinal of a MoE layer (0-based; dense layers are not counted). A *span* is the run of
new tokens of one sequence that one step of the decode loop works on. Tensors travel beside a message as
blobs (see `codec`); each docstring says which blobs a message carries. T token rows, H hidden size.
Times in a message are durations: clocks of two machines are never compared.
"""

from typing import Literal

import msgspec

PROTOCOL_VERSION = 4
MAX_LOADED_TOLD = 64  # loads told of in one message

Role = Literal["node", "predictor"]
# What nodes do with an expert once it was computed: free its slot at once, or keep it until room is needed, the least
# recently used one going first ("lru"), or the one the server names ("importance").
SlotMode = Literal["on-demand", "lru", "importance"]
# Where a forecast expert goes: the experts of one span dealt round the layer's group, or each to a node of the group
# that does not depend on which others there are, so that several spans share loads.
Placing = Literal["span", "expert"]
# What a predictor is told of each step: keys and values, those and what the gates saw, or the gates' choices without or
# with the rows they saw.
Wants = Literal["cache", "cache+inputs", "routings", "inputs"]


# The longest a load may take to be counted in each place of `SlotReport.load_counts`; the last one has the rest.
LOAD_BOUNDS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Base of all messages; the tag is the class name."""


class Span(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """`length` new tokens of `sequence`, the first at `position`."""

    sequence: int
    position: int
    length: int = 1


class Member(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """A node agent that takes part in placement. One load takes it `load_us` microseconds; 0 when not known."""

    node_id: str
    slots: int
    load_us: int = 0


class ExpertRef(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """One expert of the model."""

    layer: int
    expert: int


# ---------------------------------------------------------------------------------- node, predictor -> server


class Hello(Message, frozen=True):
    """First message of a peer, repeated until answered by `Welcome` or `Refused`. `incarnation` is drawn anew at
    each start of the process, so that a restart behind the same id is seen. `load_us` is what one load took a node when
    it tried; `wants` is a predictor's."""

    role: Role
    peer_id: str
    incarnation: int
    package_version: str
    store_digest: str
    slots: int = 0
    budget_bytes: int = 0
    load_us: int = 0
    wants: Wants = "cache"


class SlotReport(Message, frozen=True):
    """Periodic truth about a node's memory and work, sent with each heartbeat of a node. Counters only grow.
    `load_counts` are the whole loads by what they took, see `LOAD_BOUNDS_S`."""

    used_slots: int
    accounted_bytes: int
    arena_bytes: int
    budget_bytes: int
    rss_bytes: int
    loads_total: int
    loads_failed_total: int
    loads_cancelled_total: int
    loads_unused_total: int
    load_bytes_total: int
    load_s_total: float
    compute_s_total: float
    protocol_errors_total: int
    loads_broken_off_total: int
    broken_off_s_total: float
    evictions_total: int
    late_forecasts_total: int
    overflowed_total: int
    stale_total: int
    duplicates_total: int
    expired_total: int
    undelivered_total: int
    loop_errors_total: int
    load_counts: list[int]


class ShadowReport(Message, frozen=True):
    """Periodic truth about a predictor's work, sent with each of its heartbeats. Counters only grow. `undelivered`:
    forecasts and rollbacks whose receiver was not there; `refused`: orders there was no room for; `rebirths`: how often
    it forgot every sequence and came back."""

    forecasts_total: int
    rollbacks_total: int
    undelivered_total: int
    refused_total: int
    rebirths_total: int
    protocol_errors_total: int
    loop_errors_total: int


class Loaded(Message, frozen=True):
    """An expert came to rest in a slot, `ago_s` before this was sent; `on_demand` when no forecast had asked for it.
    `held`: as in `Result`."""

    layer: int
    expert: int
    load_s: float
    load_bytes: int
    on_demand: bool
    ago_s: float = 0.0
    held: list[ExpertRef] = []


class LoadFailed(Message, frozen=True):
    """An expert could not be loaded (unreadable store, no memory); computes that need it get `ComputeFailed`."""

    layer: int
    expert: int
    reason: str


class ExpertTiming(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """What one expert cost on the node: `outcome` is hit (was in its slot), late (was loading), miss (had to be
    ordered by the compute itself). `fresh`: no compute had had it since it was loaded, so the load was for this one."""

    expert: int
    outcome: Literal["hit", "late", "miss"]
    wait_s: float
    compute_s: float
    fresh: bool = False


class Result(Message, frozen=True):
    """Answer to a `Compute`. Blob 0: rows_TH, unweighted expert outputs in the order of the request's rows. `held`:
    in mode "importance" all experts that lie whole in the node's slots. `loaded`: the loads that ended since the node
    last told of any; in a message of their own they would cost both sides as much as the answer does."""

    request_id: int
    layer: int
    timings: list[ExpertTiming]
    held: list[ExpertRef] = []
    loaded: list[Loaded] = []


class ComputeFailed(Message, frozen=True):
    """Answer to a `Compute` that could not be served."""

    request_id: int
    code: Literal["load_failed", "expired", "bad_request", "cancelled"]
    reason: str


class Bye(Message, frozen=True):
    """The peer leaves on purpose."""

    reason: str


# ------------------------------------------------------------------------------------------------- both ways


class Heartbeat(Message, frozen=True):
    """Life sign; `count` grows by one with each."""

    count: int


class ProtocolErrorNotice(Message, frozen=True):
    """The receiver could not accept something it was sent."""

    reason: str


# ---------------------------------------------------------------------------------- server -> node, predictor


class Welcome(Message, frozen=True):
    """The peer is taken in. Peer and server send a `Heartbeat` each `heartbeat_s`; either takes the other for
    lost after `lost_after_s` without any message."""

    heartbeat_s: float
    lost_after_s: float


class Refused(Message, frozen=True):
    """The peer is not taken in; the reason names what differs and says what to do."""

    reason: str


class View(Message, frozen=True):
    """Who takes part, in placement order, what becomes of an expert's slot, and how experts are placed. The envelope's
    epoch is the view's."""

    members: list[Member]
    group_size: int
    mode: SlotMode = "on-demand"
    placing: Placing = "span"


class Compute(Message, frozen=True):
    """Compute experts on token rows. Blob 0: rows_TH, rows of experts[0] first (counts[0] of them), and so on.
    `runs` cuts all these rows, in order, into those that belong together (none crosses from one expert to the next):
    each run is multiplied by itself, so that a sequence's results are the bits it would get alone. Empty: one run an
    expert.
    All forecasts for these spans at this layer or before that are not named here are void. After `ttl_s` the
    server does not want the answer any more. `leaving`: which resting experts go first when room is needed, until
    another order is named; those not named go after them."""

    request_id: int
    spans: list[Span]
    layer: int
    experts: list[int]
    counts: list[int]
    ttl_s: float
    runs: list[int] = []
    leaving: list[ExpertRef] = []


class Load(Message, frozen=True):
    """Load experts ahead of a compute that is certain to come (prefill; the gate has spoken), or as good as (mode
    "importance"). `leaving`: as in `Compute`."""

    spans: list[Span]
    layer: int
    experts: list[int]
    leaving: list[ExpertRef] = []


class Release(Message, frozen=True):
    """The gate has spoken for these spans at this layer and needs none of this node's forecasts for it (nor for
    layers before)."""

    spans: list[Span]
    layer: int


class Cancel(Message, frozen=True):
    """The sequence is over: forget its forecasts and computes, free its slots."""

    sequence: int


class Withdraw(Message, frozen=True):
    """Another node was first with this compute: forget it, as far as it has not begun."""

    request_id: int


# ----------------------------------------------------------------------------------------- server -> predictor


class CacheLayer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """One decoder layer's share of an `Align`: `kind` kv brings keys and values of the newest `rows` positions
    (two blobs, [1, heads, rows, dim]); `kind` state replaces the layer's whole recurrent state (`blobs` of them).
    `length` is how many positions the layer has seen after it."""

    kind: Literal["kv", "state"]
    rows: int
    length: int
    blobs: int


class Start(Message, frozen=True):
    """A sequence begins."""

    sequence: int


class Align(Message, frozen=True):
    """Token and KV alignment. `cache` (one entry a decoder layer, blobs in that order; empty when KV is not
    aligned this time) brings the shadow's cache to `position` tokens; `tokens` are the next inputs, whose
    routings the shadow forecasts; when there are none, it goes on with its own next token there."""

    sequence: int
    position: int
    tokens: list[int]
    cache: list[CacheLayer]


class Routed(Message, frozen=True):
    """The gates of a decode step have spoken at a layer: for predictors that want routings. Blob 0, if inputs are
    wanted too: x_TH, the rows the gate saw, one a token of the span."""

    span: Span
    layer: int
    experts: list[int]


class End(Message, frozen=True):
    """The sequence is over."""

    sequence: int


# ---------------------------------------------------------------------------------- predictor -> node, server


class Schedule(Message, frozen=True):
    """Forecast of one layer for one span, sent as soon as the shadow's own router has spoken. To a node: the
    experts that placement gives that node. To the server: all of them, and with the first layer the `tokens` of the
    span the forecast was made for: where the shadow had gone on by itself, they are a draft."""

    span: Span
    layer: int
    experts: list[int]
    tokens: list[int] = []


class Rollback(Message, frozen=True):
    """All forecasts of the sequence from `position` on are void: the shadow had gone on with a wrong token."""

    sequence: int
    position: int


ToServer = (
    Hello
    | SlotReport
    | ShadowReport
    | Loaded
    | LoadFailed
    | Result
    | ComputeFailed
    | Bye
    | Heartbeat
    | ProtocolErrorNotice
    | Schedule
    | Rollback
)
ToNode = (
    Welcome
    | Refused
    | View
    | Compute
    | Load
    | Release
    | Cancel
    | Withdraw
    | Schedule
    | Rollback
    | Heartbeat
    | Bye
    | ProtocolErrorNotice
)
ToPredictor = Welcome | Refused | View | Start | Align | Routed | End | Hello | Heartbeat | Bye | ProtocolErrorNotice
AnyMessage = ToServer | ToNode | ToPredictor
