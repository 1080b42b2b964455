"""Bytes of one message: a msgpack header frame, then a raw frame per blob. Knows no sockets and no tensors.

Nothing received is used before it was checked against the header and the limits; whatever is wrong comes out
as `ProtocolError`. Blobs are views of the frames they came in: nothing is copied.
"""

from collections.abc import Sequence
from functools import cache
from types import UnionType

import msgspec

from odmoe_wire.checks import (
    ITEMSIZE_BYTES,
    NUMBER_BOUND,
    BlobSpec,
    Dtype,
    Limits,
    ProtocolError,
    check_message,
)
from odmoe_wire.messages import PROTOCOL_VERSION, AnyMessage

__all__ = [
    "Blob",
    "BlobSpec",
    "Decoder",
    "Dtype",
    "Envelope",
    "Frame",
    "Limits",
    "ProtocolError",
    "Received",
    "decode",
    "encode",
]

Frame = bytes | memoryview


class Blob(msgspec.Struct, frozen=True):
    """Raw values of one tensor, C order, little endian; `data` must not change while it is on its way."""

    dtype: Dtype
    shape: tuple[int, ...]
    data: Frame


class Envelope(msgspec.Struct, frozen=True, array_like=True):
    """The header frame. The version comes first, so that it can be read whatever else has changed."""

    version: int
    epoch: int
    message: AnyMessage
    blobs: list[BlobSpec]


class _Header(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """An `Envelope` whose message is not looked at yet."""

    version: int
    epoch: int
    message: msgspec.Raw
    blobs: list[BlobSpec]


class _Version(msgspec.Struct, frozen=True, array_like=True):
    """The part of a header that every version of the protocol has."""

    version: int


class Received(msgspec.Struct, frozen=True):
    """A message that passed every check."""

    epoch: int
    message: AnyMessage
    blobs: tuple[Blob, ...]


# What msgspec raises on bad input; UnicodeDecodeError is a ValueError.
_MALFORMED = (msgspec.MsgspecError, ValueError, RecursionError, OverflowError)
_encoder = msgspec.msgpack.Encoder()
_header_decoder = msgspec.msgpack.Decoder(_Header)
_version_decoder = msgspec.msgpack.Decoder(_Version)


def encode(message: AnyMessage, *, epoch: int, blobs: Sequence[Blob] = ()) -> list[Frame]:
    """Frames of a message: the header, then each blob's data as it is."""
    specs = [BlobSpec(blob.dtype, blob.shape) for blob in blobs]
    frames: list[Frame] = [_encoder.encode(Envelope(PROTOCOL_VERSION, epoch, message, specs))]
    frames.extend(blob.data for blob in blobs)
    return frames


class Decoder:
    """Decodes what one receiver accepts: `accept` is a union of message types. Immutable, free to share."""

    def __init__(self, *, accept: UnionType, limits: Limits) -> None:
        self.limits = limits
        self._message = _message_decoder(accept)

    def decode(self, frames: Sequence[Frame]) -> Received:
        """Check everything and give the message with its blobs, which are views of `frames`."""
        limits = self.limits
        if not frames or len(frames) > limits.max_blobs + 1:
            raise ProtocolError(f"{len(frames)} frames, not 1..{limits.max_blobs + 1}")
        header = _decode_header(frames[0], limits)
        if len(header.blobs) != len(frames) - 1:
            raise ProtocolError(f"the header names {len(header.blobs)} blobs, {len(frames) - 1} came")
        blobs = tuple(map(_checked_blob, header.blobs, frames[1:], [limits] * len(header.blobs)))
        if sum(_num_bytes(frame) for frame in frames) > limits.max_message_bytes:
            raise ProtocolError(f"a message of more than {limits.max_message_bytes} bytes")
        try:
            message = self._message.decode(header.message)
        except _MALFORMED as error:
            raise ProtocolError(f"message not accepted: {_brief(error)}") from None
        check_message(message, header.blobs, limits)
        return Received(header.epoch, message, blobs)


def decode(frames: Sequence[Frame], *, accept: UnionType, limits: Limits) -> Received:
    """`Decoder.decode` for callers that keep no decoder."""
    return Decoder(accept=accept, limits=limits).decode(frames)


@cache
def _message_decoder(accept: UnionType) -> "msgspec.msgpack.Decoder[AnyMessage]":
    return msgspec.msgpack.Decoder(accept)


def _num_bytes(frame: Frame) -> int:
    return frame.nbytes if isinstance(frame, memoryview) else len(frame)


def _decode_header(frame: Frame, limits: Limits) -> _Header:
    if _num_bytes(frame) > limits.max_header_bytes:
        raise ProtocolError(f"a header of {_num_bytes(frame)} bytes, at most {limits.max_header_bytes}")
    try:
        header = _header_decoder.decode(frame)
    except _MALFORMED as error:
        _check_version(_version_of(frame))
        raise ProtocolError(f"malformed header: {_brief(error)}") from None
    _check_version(header.version)
    if not 0 <= header.epoch < NUMBER_BOUND:
        raise ProtocolError(f"epoch {header.epoch} is not in 0..{NUMBER_BOUND - 1}")
    return header


def _version_of(frame: Frame) -> int:
    """The version a header this side cannot read says it has; this side's own when even that is missing."""
    try:
        return _version_decoder.decode(frame).version
    except _MALFORMED:
        return PROTOCOL_VERSION


def _check_version(version: int) -> None:
    if version != PROTOCOL_VERSION:
        raise ProtocolError(
            f"the peer speaks protocol version {version}, this side speaks {PROTOCOL_VERSION}: "
            "run the same odmoe release on both"
        )


def _checked_blob(spec: BlobSpec, frame: Frame, limits: Limits) -> Blob:
    """The blob, when its frame has exactly the bytes that dtype and shape ask for."""
    if len(spec.shape) > limits.max_dims:
        raise ProtocolError(f"a blob of {len(spec.shape)} dimensions, at most {limits.max_dims}")
    size_bytes = ITEMSIZE_BYTES[spec.dtype]
    for dim in spec.shape:
        if not 0 <= dim <= limits.max_blob_bytes:
            raise ProtocolError(f"dimension {dim} is not in 0..{limits.max_blob_bytes}")
        size_bytes *= dim
    if size_bytes > limits.max_blob_bytes or size_bytes != _num_bytes(frame):
        raise ProtocolError(
            f"a blob of {_num_bytes(frame)} bytes where {spec.dtype} {list(spec.shape)} makes {size_bytes}, "
            f"at most {limits.max_blob_bytes}"
        )
    return Blob(spec.dtype, spec.shape, frame)


def _brief(error: Exception) -> str:
    """First line of an error, cut to a length that fits a log line."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
