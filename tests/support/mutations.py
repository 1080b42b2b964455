"""Messages with something wrong: what a broken or hostile peer might send. Pure; knows no socket.

Every role receives one union of messages; samples of all of them are what mutation starts from.
"""

import random
from types import UnionType

import msgspec

from odmoe_wire import messages as m
from odmoe_wire.codec import Frame, ProtocolError, Received, decode, encode
from support.sample_messages import LIMITS, SAMPLES, union_of

ENCODED = [
    (kind, [bytes(frame) for frame in encode(message, epoch=9, blobs=blobs)], union_of(kind))
    for kind, (message, blobs) in SAMPLES.items()
]
# Bytes that mean much in msgpack: nil, the longest map, array and string, numbers at the edge.
_NASTY = (
    b"\xc0",
    b"\xdf\xff\xff\xff\xff",
    b"\xdd\xff\xff\xff\xff",
    b"\xdb\xff\xff\xff\xff",
    b"\xcf\xff\xff\xff\xff\xff\xff\xff\xff",
    b"\xd3\x80\x00\x00\x00\x00\x00\x00\x00",
    b"\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00",
    b"\x91" * 64,
)


def attempt(frames: list[bytes], accept: UnionType) -> Received | None:
    """The message, None when refused; anything but `ProtocolError` goes through. What is accepted is sound."""
    try:
        received = decode(frames, accept=accept, limits=LIMITS)
    except ProtocolError:
        return None
    again: list[Frame] = encode(received.message, epoch=received.epoch, blobs=received.blobs)
    assert decode(again, accept=accept, limits=LIMITS) == received
    return received


def mutated(frames: list[bytes], dice: random.Random) -> list[bytes]:
    """Frames with one to three things wrong: bytes changed, cut, grown, frames lost, doubled or exchanged."""
    frames = list(frames)
    for _ in range(dice.randint(1, 3)):
        if not frames:
            return [dice.randbytes(dice.randint(0, 40))]
        i = dice.randrange(len(frames))
        match dice.randrange(10):
            case 0:
                del frames[i]
            case 1:
                frames.insert(i, frames[i])
            case 2:
                j = dice.randrange(len(frames))
                frames[i], frames[j] = frames[j], frames[i]
            case _:
                frames[i] = _bent(bytearray(frames[i]), dice)
    return frames


def _bent(data: bytearray, dice: random.Random) -> bytes:
    match dice.randrange(5):
        case 0 if data:
            data[dice.randrange(len(data))] = dice.randrange(256)
        case 1 if data:
            data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        case 2:
            del data[dice.randrange(len(data) + 1) :]
        case 3:
            at = dice.randrange(len(data) + 1)
            data[at : at + dice.randrange(2)] = dice.choice(_NASTY)
        case _:
            at = dice.randrange(len(data) + 1)
            data[at:at] = dice.randbytes(dice.randint(1, 9))
    return bytes(data)


def misspoken(dice: random.Random) -> tuple[list[bytes], UnionType]:
    """Well-formed msgpack that says something odd: a field of a sample with the value of another's, or a number."""
    kind, frames, accept = dice.choice(ENCODED)
    message, blobs = SAMPLES[kind]
    fields = dict(msgspec.to_builtins(message))
    other = list(dict(msgspec.to_builtins(SAMPLES[dice.choice(ENCODED)[0]][0])).values())
    name = dice.choice(sorted(fields))
    fields[name] = dice.choice([*other, -1, 0, 1 << 31, 1 << 63, 1e308, float("nan"), "", [], [[]], {}, None, True])
    specs = [[blob.dtype, blob.shape] for blob in blobs]
    epoch = dice.choice([9, 0, -1, 1 << 62])
    return [msgspec.msgpack.encode([m.PROTOCOL_VERSION, epoch, fields, specs]), *frames[1:]], accept


def drawn(dice: random.Random) -> tuple[list[bytes], UnionType]:
    """The next frames to try, and what their receiver accepts."""
    choice = dice.randrange(10)
    if choice == 0:
        return [dice.randbytes(dice.randint(0, 200)) for _ in range(dice.randint(0, 4))], dice.choice(ENCODED)[2]
    if choice < 3:
        return misspoken(dice)
    _, frames, accept = dice.choice(ENCODED)
    return mutated(frames, dice), accept
