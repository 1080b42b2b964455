"""Whatever bytes come in, the codec gives a checked message or `ProtocolError`, and a socket survives them."""

import random
from collections import Counter

import msgspec
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from odmoe_wire import messages as m
from odmoe_wire.codec import encode
from odmoe_wire.link import RouterLink
from odmoe_wire.waiting import Wake, wait
from support.mutations import ENCODED, attempt, drawn, mutated
from support.sample_messages import LIMITS, SAMPLES, union_of

MUTATIONS = 20_000


def test_mutated_messages() -> None:
    dice = random.Random(20_260_101)
    outcomes: Counter[str] = Counter()
    for _ in range(MUTATIONS):
        frames, accept = drawn(dice)
        outcomes["refused" if attempt(frames, accept) is None else "accepted"] += 1
    # Most mutations hurt, some only change a value; a codec that refuses or takes everything would show here.
    assert outcomes["refused"] > MUTATIONS // 2
    assert outcomes["accepted"] > MUTATIONS // 100


@settings(max_examples=300, deadline=None)
@given(frames=st.lists(st.binary(max_size=200), max_size=4), index=st.integers(0, len(ENCODED) - 1))
def test_random_bytes(frames: list[bytes], index: int) -> None:
    attempt(frames, ENCODED[index][2])


# Anything msgpack can say, in the place of the header or of the message in it.
MSGPACK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=300, deadline=None)
@given(value=MSGPACK)
def test_any_msgpack_as_header(value: object) -> None:
    attempt([msgspec.msgpack.encode(value)], m.ToServer)


@settings(max_examples=500, deadline=None)
@given(
    kind=st.sampled_from(sorted(SAMPLES, key=lambda kind: kind.__name__)),
    changes=st.dictionaries(st.integers(0, 12), MSGPACK, max_size=3),
)
def test_any_value_in_any_field(kind: type, changes: dict[int, object]) -> None:
    message, blobs = SAMPLES[kind]
    fields = msgspec.to_builtins(message)
    names = sorted(fields)
    fields.update({names[at % len(names)]: value for at, value in changes.items()})
    header = msgspec.msgpack.encode([m.PROTOCOL_VERSION, 9, fields, [[b.dtype, b.shape] for b in blobs]])
    attempt([header, *(bytes(blob.data) for blob in blobs)], union_of(kind))


def test_a_router_fed_garbage_goes_on() -> None:
    dice = random.Random(7)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    wake = Wake()
    link = RouterLink.bind("inproc://fuzz", context=context, accept=m.ToServer, limits=LIMITS, hwm=100)
    raw = context.socket(zmq.DEALER)
    raw.linger = 0
    raw.routing_id = b"node-1"
    raw.connect("inproc://fuzz")
    bad = 0
    try:
        for _ in range(200):
            frames = mutated(dice.choice(ENCODED)[1], dice) or [b""]
            raw.send_multipart(frames)
            bad += link.receive() is None
        assert bad > 100
        assert link.protocol_errors == bad
        raw.send_multipart(encode(m.Heartbeat(count=1), epoch=3))
        assert wait([link], wake, timeout_s=5.0)
        received = link.receive()
        assert received is not None
        assert (received[0], received[1].message) == ("node-1", m.Heartbeat(count=1))
    finally:
        raw.close()
        link.close()
        wake.close()
        context.term()
