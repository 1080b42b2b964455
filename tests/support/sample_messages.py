"""One good example of every message, with its blobs, that passes `LIMITS`. Knows nothing of tests."""

import struct
from types import UnionType
from typing import get_args

from odmoe_wire import messages as m
from odmoe_wire.codec import Blob, Limits

LIMITS = Limits(num_layers=4, num_experts=8, hidden_size=3)

_SPAN = m.Span(7, 41, 2)
_ROWS_TH = Blob("float32", (3, 3), struct.pack("<9f", *range(9)))
_KEYS = Blob("bfloat16", (1, 2, 1, 2), bytes(range(8)))

SAMPLES: dict[type, tuple[m.AnyMessage, tuple[Blob, ...]]] = {
    type(message): (message, blobs)
    for message, blobs in (
        (
            m.Hello(
                role="node",
                peer_id="node-1",
                incarnation=99,
                package_version="0.1.0",
                store_digest="ab12",
                slots=3,
                budget_bytes=1 << 20,
                load_us=2500,
                wants="inputs",
            ),
            (),
        ),
        (
            m.SlotReport(
                used_slots=1,
                accounted_bytes=2,
                arena_bytes=3,
                budget_bytes=4,
                rss_bytes=5,
                loads_total=6,
                loads_failed_total=7,
                loads_cancelled_total=8,
                loads_unused_total=9,
                load_bytes_total=10,
                load_s_total=0.5,
                compute_s_total=0.25,
                protocol_errors_total=11,
                loads_broken_off_total=12,
                broken_off_s_total=0.125,
                evictions_total=13,
                late_forecasts_total=14,
                overflowed_total=15,
                stale_total=16,
                duplicates_total=17,
                expired_total=18,
                undelivered_total=19,
                loop_errors_total=20,
                load_counts=list(range(len(m.LOAD_BOUNDS_S) + 1)),
            ),
            (),
        ),
        (
            m.ShadowReport(
                forecasts_total=1,
                rollbacks_total=2,
                undelivered_total=3,
                refused_total=4,
                rebirths_total=5,
                protocol_errors_total=6,
                loop_errors_total=7,
            ),
            (),
        ),
        (
            m.Loaded(
                layer=1,
                expert=5,
                load_s=0.5,
                load_bytes=1024,
                on_demand=True,
                ago_s=0.25,
                held=[m.ExpertRef(1, 5), m.ExpertRef(3, 7)],
            ),
            (),
        ),
        (m.LoadFailed(layer=1, expert=5, reason="no memory"), ()),
        (
            m.Result(
                request_id=3, layer=1, timings=[m.ExpertTiming(5, "late", 0.5, 0.25, True)], held=[m.ExpertRef(1, 5)]
            ),
            (_ROWS_TH,),
        ),
        (m.ComputeFailed(request_id=3, code="expired", reason="too late"), ()),
        (m.Bye(reason="stopping"), ()),
        (m.Heartbeat(count=12), ()),
        (m.ProtocolErrorNotice(reason="no"), ()),
        (m.Welcome(heartbeat_s=0.5, lost_after_s=2.0), ()),
        (m.Refused(reason="another store"), ()),
        (
            m.View(
                members=[m.Member("node-1", 3), m.Member("node-2", 4, 2500)],
                group_size=2,
                mode="lru",
                placing="expert",
            ),
            (),
        ),
        (
            m.Compute(
                request_id=3,
                spans=[_SPAN],
                layer=1,
                experts=[2, 5],
                counts=[1, 2],
                ttl_s=1.5,
                runs=[1, 1, 1],
                leaving=[m.ExpertRef(0, 3)],
            ),
            (_ROWS_TH,),
        ),
        (m.Load(spans=[_SPAN], layer=1, experts=[2, 5], leaving=[m.ExpertRef(0, 3)]), ()),
        (m.Release(spans=[_SPAN], layer=1), ()),
        (m.Cancel(sequence=7), ()),
        (m.Withdraw(request_id=3), ()),
        (m.Start(sequence=7), ()),
        (
            m.Align(
                sequence=7,
                position=41,
                tokens=[300, 2],
                cache=[m.CacheLayer("kv", 1, 41, 2), m.CacheLayer("state", 0, 41, 1)],
            ),
            (_KEYS, _KEYS, Blob("uint8", (2,), b"\x01\x02")),
        ),
        (m.Routed(span=_SPAN, layer=1, experts=[2, 5]), (Blob("float32", (2, 3), bytes(24)),)),
        (m.Rollback(sequence=7, position=40), ()),
        (m.End(sequence=7), ()),
        (m.Schedule(span=_SPAN, layer=1, experts=[2, 5], tokens=[300, 2]), ()),
    )
}


def union_of(message_type: type) -> UnionType:
    """A role's union that accepts messages of this type."""
    return next(union for union in (m.ToServer, m.ToNode, m.ToPredictor) if message_type in get_args(union))
