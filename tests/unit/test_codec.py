"""What the codec refuses, and how it says so; what it accepts without copying."""

import math
import struct
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from odmoe_wire import checks
from odmoe_wire import messages as m
from odmoe_wire.codec import Blob, Decoder, Frame, Limits, ProtocolError, Received, decode, encode
from support.sample_messages import LIMITS, SAMPLES, union_of

SPAN = m.Span(7, 41, 2)
ROWS_TH = Blob("float32", (3, 3), struct.pack("<9f", *range(9)))


def compute(**changes: Any) -> m.Compute:
    fields: dict[str, Any] = {
        "request_id": 3, "spans": [SPAN], "layer": 1, "experts": [2, 5], "counts": [1, 2], "ttl_s": 1.5
    }  # fmt: skip
    return m.Compute(**(fields | changes))


def through(message: m.AnyMessage, *, blobs: Sequence[Blob] = (), epoch: int = 0, limits: Limits = LIMITS) -> Received:
    frames = encode(message, epoch=epoch, blobs=blobs)
    return decode(frames, accept=union_of(type(message)), limits=limits)


def header(*values: Any) -> list[Frame]:
    return [msgspec.msgpack.encode(values)]


def test_blobs_are_views_of_their_frames() -> None:
    data = bytearray(ROWS_TH.data)
    frames = [encode(compute(), epoch=0, blobs=[ROWS_TH])[0], memoryview(data)]
    received = decode(frames, accept=m.ToNode, limits=LIMITS)
    data[0] = 77
    assert received.blobs[0].data[0] == 77


def test_every_message_has_rules() -> None:
    with_blobs, without = set(checks._WITH_BLOBS), set(checks._WITHOUT_BLOBS)
    assert with_blobs | without == set(SAMPLES)
    assert not with_blobs & without


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (compute(layer=4), "layer 4 is not in 0..3"),
        (compute(layer=-1), "layer -1"),
        (compute(experts=[2, 8]), "expert 8 is not in 0..7"),
        (compute(experts=[-1, 2]), "expert -1"),
        (compute(experts=[2, 2]), "repeated"),
        (compute(experts=[], counts=[]), "0 counts for 0 experts"),
        (compute(counts=[3]), "1 counts for 2 experts"),
        (compute(counts=[3, 0]), "at least one row"),
        (compute(counts=[1, 1]), "sum to 2, the blob has 3 rows"),
        (compute(counts=[4, -1]), "at least one row"),
        (compute(runs=[1, 2, 0]), "run needs at least one row"),
        (compute(runs=[1, 3, -1]), "run needs at least one row"),
        (compute(runs=[1, 1]), "runs sum to 2, counts to 3"),
        (compute(runs=[1, 2, 1]), "runs sum to 4, counts to 3"),
        (compute(runs=[2, 1]), "goes from one expert to the next"),
        (compute(runs=[3]), "goes from one expert to the next"),
        (compute(ttl_s=0.0), "ttl_s"),
        (compute(ttl_s=math.nan), "ttl_s"),
        (compute(ttl_s=math.inf), "ttl_s"),
        (compute(ttl_s=3600.5), "ttl_s"),
        (compute(spans=[]), "0 spans"),
        (compute(spans=[m.Span(-1, 0)]), "sequence -1"),
        (compute(spans=[m.Span(1, -1)]), "position -1"),
        (compute(spans=[m.Span(1, 0, 0)]), "span length 0"),
        (compute(spans=[m.Span(1, 0, 1 << 21)]), "span length"),
        (compute(request_id=-1), "request_id -1"),
        (compute(request_id=1 << 63), "request_id"),
        (m.Result(request_id=1, layer=0, timings=[m.ExpertTiming(1, "hit", -0.5, 0.0)]), "wait_s"),
        (m.Result(request_id=1, layer=0, timings=[m.ExpertTiming(1, "hit", 0.0, math.inf)]), "compute_s"),
    ],
)  # fmt: skip
def test_values_that_make_no_sense_with_rows(message: m.AnyMessage, problem: str) -> None:
    with pytest.raises(ProtocolError, match=problem):
        through(message, blobs=[ROWS_TH])


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (msgspec.structs.replace(SAMPLES[m.Hello][0], peer_id="a b"), "peer id"),
        (msgspec.structs.replace(SAMPLES[m.Hello][0], peer_id=""), "peer id"),
        (msgspec.structs.replace(SAMPLES[m.Hello][0], peer_id="x" * 65), "peer id"),
        (msgspec.structs.replace(SAMPLES[m.Hello][0], peer_id="n\n"), "peer id"),
        (msgspec.structs.replace(SAMPLES[m.Hello][0], store_digest=""), "digest"),
        (msgspec.structs.replace(SAMPLES[m.Hello][0], slots=-1), "slots -1"),
        (msgspec.structs.replace(SAMPLES[m.SlotReport][0], rss_bytes=-1), "rss_bytes -1"),
        (msgspec.structs.replace(SAMPLES[m.SlotReport][0], load_s_total=math.nan), "load_s_total"),
        (msgspec.structs.replace(SAMPLES[m.SlotReport][0], load_counts=[1, 2]), "2 load_counts"),
        (msgspec.structs.replace(SAMPLES[m.SlotReport][0], load_counts=[-1] * 16), "load_counts -1"),
        (msgspec.structs.replace(SAMPLES[m.ShadowReport][0], forecasts_total=-1), "forecasts_total -1"),
        (m.View(members=[m.Member("a", 1), m.Member("a", 2)], group_size=1), "named twice"),
        (m.View(members=[m.Member("a", 0)], group_size=1), "0 slots"),
        (m.View(members=[m.Member("/a", 1)], group_size=1), "peer id"),
        (m.View(members=[], group_size=0), "group_size 0"),
        (m.Welcome(heartbeat_s=2.0, lost_after_s=2.0), "heartbeat_s < lost_after_s"),
        (m.Welcome(heartbeat_s=0.0, lost_after_s=2.0), "heartbeat_s"),
        (m.Welcome(heartbeat_s=1.0, lost_after_s=math.inf), "lost_after_s"),
        (m.Bye(reason="x" * 16_385), "16385 characters"),
        (m.Heartbeat(count=-1), "count -1"),
        (m.Schedule(span=SPAN, layer=1, experts=[1, 1]), "repeated"),
        (m.Schedule(span=SPAN, layer=0, experts=[1], tokens=[-1]), "token -1"),
        (m.Schedule(span=SPAN, layer=0, experts=[1], tokens=[1 << 31]), "token 2147483648"),
        (m.Schedule(span=SPAN, layer=0, experts=[1], tokens=[4, 5, 6]), "3 tokens for a span of 2"),
        (m.Load(spans=[SPAN], layer=9, experts=[1]), "layer 9"),
        (m.Loaded(layer=0, expert=1, load_s=-1.0, load_bytes=1, on_demand=False), "load_s"),
        (m.Loaded(layer=0, expert=1, load_s=1.0, load_bytes=1, on_demand=False, ago_s=-1.0), "ago_s"),
        (m.LoadFailed(layer=0, expert=8, reason=""), "expert 8"),
        (m.Rollback(sequence=1, position=1 << 31), "position"),
        (m.Cancel(sequence=-1), "sequence -1"),
        (m.Align(sequence=1, position=0, tokens=[-5], cache=[]), "token -5"),
        (m.Align(sequence=1, position=0, tokens=[], cache=[m.CacheLayer("kv", 1, 1, 2)]), "2 blobs, 0 are left"),
        (m.Align(sequence=1, position=0, tokens=[], cache=[m.CacheLayer("state", 1, 1, -1)]), "-1 blobs"),
    ],
)  # fmt: skip
def test_values_that_make_no_sense(message: m.AnyMessage, problem: str) -> None:
    with pytest.raises(ProtocolError, match=problem):
        through(message)


@pytest.mark.parametrize(
    ("message", "blobs", "problem"),
    [
        (compute(), [], "0 blobs, needs 1"),
        (compute(), [ROWS_TH, ROWS_TH], "2 blobs, needs 1"),
        (compute(), [Blob("int32", (3, 3), bytes(36))], "2-d float blob"),
        (compute(), [Blob("float32", (9,), bytes(36))], "2-d float blob"),
        (compute(), [Blob("float32", (3, 4), bytes(48))], "hidden size is 3"),
        (m.Heartbeat(count=1), [ROWS_TH], "Heartbeat carries no blobs"),
        (
            m.Align(sequence=1, position=0, tokens=[], cache=[m.CacheLayer("kv", 1, 1, 2)]),
            [Blob("int8", (1, 2, 1, 2), bytes(4)), Blob("int8", (1, 2, 2, 1), bytes(4))],
            r"not \[1, heads, 1, dim\]",
        ),
        (
            m.Align(sequence=1, position=0, tokens=[], cache=[m.CacheLayer("kv", 1, 1, 1)]),
            [Blob("int8", (1, 2, 1, 2), bytes(4))],
            "keys and values",
        ),
        (m.Align(sequence=1, position=0, tokens=[], cache=[]), [ROWS_TH], "1 blobs, the cache layers name 0"),
    ],
)
def test_blobs_that_do_not_fit_the_message(message: m.AnyMessage, blobs: list[Blob], problem: str) -> None:
    with pytest.raises(ProtocolError, match=problem):
        through(message, blobs=blobs)


@pytest.mark.parametrize(
    ("blob", "problem"),
    [
        (Blob("float32", (3, 3), bytes(35)), "35 bytes where float32 .* makes 36"),
        (Blob("float32", (3, 3), bytes(37)), "37 bytes"),
        (Blob("float32", (-3, -3), bytes(36)), "dimension -3"),
        (Blob("float32", (1 << 62, 1 << 62, 0), b""), "dimension"),
        (Blob("float32", (900, 900), bytes(36)), "makes 3240000, at most 1000"),
        (Blob("float32", (1,) * 9, bytes(4)), "9 dimensions"),
        (Blob("float64", (3, 3), bytes(72)), "malformed header"),  # type: ignore[arg-type]
        (Blob("uint8", (2, 600), bytes(1200)), "at most 1000"),
    ],
)
def test_blobs_whose_header_lies(blob: Blob, problem: str) -> None:
    limits = msgspec.structs.replace(LIMITS, max_blob_bytes=1000)
    with pytest.raises(ProtocolError, match=problem):
        through(compute(), blobs=[blob], limits=limits)


def test_another_version_is_named_even_when_nothing_else_can_be_read() -> None:
    for frames in (header(7, 0, {"type": "Heartbeat", "count": 1}, []), header(7, "what", "ever"), header(7)):
        with pytest.raises(ProtocolError, match="version 7, this side speaks 4"):
            decode(frames, accept=m.ToServer, limits=LIMITS)


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b""],
        [b"\xc1"],
        [b"\x94\x01\x00" + b"\x91" * 100_000],
        [b"\xdd\xff\xff\xff\xff\x01"],
        header(1, 0, {"type": "Heartbeat", "count": 1}),
        header(1, 0, {"type": "Heartbeat", "count": 1}, [], "more"),
        header(1, -1, {"type": "Heartbeat", "count": 1}, []),
        header(1, 1 << 63, {"type": "Heartbeat", "count": 1}, []),
        header(1, 0, {"type": "Heartbeat", "count": 1, "more": 2}, []),
        header(1, 0, {"type": "Heartbeat"}, []),
        header(1, 0, {"type": "Heartbeat", "count": 1.5}, []),
        header(1, 0, {"type": "Heartbeat", "count": "1"}, []),
        header(1, 0, {"type": "Message"}, []),
        header(1, 0, {"type": "Bye", "reason": msgspec.Raw(b"\xa1\xff")}, []),
        header(1, 0, {"type": "Heartbeat", "count": 1}, [["uint8", [2]]]),
        [*header(1, 0, {"type": "Heartbeat", "count": 1}, []), b"more"],
    ],
)
def test_malformed_frames(frames: list[Frame]) -> None:
    with pytest.raises(ProtocolError) as caught:
        decode(frames, accept=m.ToServer, limits=LIMITS)
    assert 0 < len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("limits", "problem"),
    [
        (Limits(max_header_bytes=20), "header of .* bytes, at most 20"),
        (Limits(max_blobs=0), "2 frames"),
        (Limits(max_blob_bytes=35), "at most 35"),
        (Limits(max_message_bytes=100), "more than 100 bytes"),
        (Limits(max_spans=0), "1 spans"),
        (Limits(max_experts=1), "too many"),
        (Limits(max_layers=1), "layer 1"),
        (Limits(max_tokens=1), "span length 2"),
        (Limits(max_position=40), "position 41"),
        (Limits(max_ttl_s=1.0), "ttl_s 1.5"),
    ],
)
def test_each_bound_bites(limits: Limits, problem: str) -> None:
    with pytest.raises(ProtocolError, match=problem):
        through(compute(), blobs=[ROWS_TH], limits=limits)
    assert through(compute(), blobs=[ROWS_TH], limits=Limits()).message == compute()


def test_a_decoder_keeps_nothing_between_messages() -> None:
    decoder = Decoder(accept=m.ToNode, limits=LIMITS)
    good = encode(compute(), epoch=5, blobs=[ROWS_TH])
    with pytest.raises(ProtocolError):
        decoder.decode(good[:1])
    assert decoder.decode(good) == Received(5, compute(), (ROWS_TH,))
