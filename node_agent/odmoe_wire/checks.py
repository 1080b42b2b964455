"""What a well-formed message may say: sizes, ranges, and how its fields and blobs must agree. Knows no bytes.

Types and field names are msgspec's business; here are the rules a type cannot express. Each rule raises
`ProtocolError` with a short sentence.
"""

import math
import re
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, Literal

import msgspec

from odmoe_wire import messages as m

Dtype = Literal["float32", "float16", "bfloat16", "int64", "int32", "int8", "uint8"]
ITEMSIZE_BYTES: dict[str, int] = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int8": 1,
    "uint8": 1,
}
FLOATS = frozenset({"float32", "float16", "bfloat16"})
# Sequence, request and incarnation numbers stay below this: they fit a signed 64-bit integer everywhere.
NUMBER_BOUND = 1 << 63
_PEER_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST = re.compile(r"[A-Za-z0-9:]{1,128}")


class ProtocolError(Exception):
    """Something received is not what the protocol allows; the text is short, fit for a log or a notice."""


class BlobSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """What the header says of one blob."""

    dtype: Dtype
    shape: tuple[int, ...]


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds on what is accepted. The model's dimensions are checked when given (None: not known yet), all else
    always."""

    max_header_bytes: int = 4 << 20
    max_blobs: int = 4096
    max_blob_bytes: int = 1 << 30
    max_message_bytes: int = 2 << 30
    max_dims: int = 8
    max_experts: int = 4096
    max_spans: int = 1024
    max_tokens: int = 1 << 20
    max_members: int = 4096
    max_layers: int = 1024
    max_text: int = 16_384
    max_position: int = 1 << 31
    max_ttl_s: float = 3600.0
    num_layers: int | None = None
    num_experts: int | None = None
    hidden_size: int | None = None


def require(condition: bool, problem: str) -> None:
    """Raise `ProtocolError(problem)` unless the condition holds."""
    if not condition:
        raise ProtocolError(problem)


def is_peer_id(text: str) -> bool:
    """Whether text may name a peer: 1 to 64 letters, digits, dots, dashes, underscores; no mark comes first."""
    return _PEER_ID.fullmatch(text) is not None


def _count(value: int, name: str, *, bound: int = NUMBER_BOUND) -> None:
    if not 0 <= value < bound:
        raise ProtocolError(f"{name} {value} is not in 0..{bound - 1}")


def _duration(value: float, name: str) -> None:
    if not (value >= 0.0 and math.isfinite(value)):
        raise ProtocolError(f"{name} {value} is not a finite, non-negative number of seconds")


def _layer(layer: int, limits: Limits) -> None:
    _count(layer, "layer", bound=limits.max_layers if limits.num_layers is None else limits.num_layers)


def _experts(experts: Sequence[int], limits: Limits) -> None:
    if len(experts) > limits.max_experts or len(set(experts)) != len(experts):
        raise ProtocolError("experts are too many or repeated")
    if experts:
        bound = limits.max_experts if limits.num_experts is None else limits.num_experts
        _count(min(experts), "expert", bound=bound)
        _count(max(experts), "expert", bound=bound)


def _refs(refs: Sequence[m.ExpertRef], limits: Limits) -> None:
    if len(refs) > limits.max_experts or len(set(refs)) != len(refs):
        raise ProtocolError("experts are too many or repeated")
    for ref in refs:
        _layer(ref.layer, limits)
    _experts(list({ref.expert for ref in refs}), limits)


def _span(span: m.Span, limits: Limits) -> None:
    _count(span.sequence, "sequence")
    _count(span.position, "position", bound=limits.max_position)
    if not 1 <= span.length <= limits.max_tokens:
        raise ProtocolError(f"span length {span.length} is not in 1..{limits.max_tokens}")


def _spans(spans: Sequence[m.Span], limits: Limits) -> None:
    require(1 <= len(spans) <= limits.max_spans, f"{len(spans)} spans, not 1..{limits.max_spans}")
    for span in spans:
        _span(span, limits)


def _text(text: str, limits: Limits) -> None:
    require(len(text) <= limits.max_text, f"text of {len(text)} characters, at most {limits.max_text}")


def _peer_id(text: str) -> None:
    require(is_peer_id(text), "a peer id has 1 to 64 letters, digits, '.', '_' or '-'")


def _rows(blobs: Sequence[BlobSpec], limits: Limits) -> int:
    """Rows of the one [rows, hidden] blob of floats that Compute and Result carry."""
    require(len(blobs) == 1, f"{len(blobs)} blobs, needs 1")
    dtype, shape = blobs[0].dtype, blobs[0].shape
    require(dtype in FLOATS and len(shape) == 2, f"rows are a 2-d float blob, not {dtype} {list(shape)}")
    if limits.hidden_size is not None and shape[1] != limits.hidden_size:
        raise ProtocolError(f"rows of {shape[1]} values, the model's hidden size is {limits.hidden_size}")
    return shape[0]


def _compute(message: m.Compute, blobs: Sequence[BlobSpec], limits: Limits) -> None:
    _count(message.request_id, "request_id")
    _spans(message.spans, limits)
    _layer(message.layer, limits)
    _experts(message.experts, limits)
    experts, counts = message.experts, message.counts
    require(len(experts) == len(counts) > 0, f"{len(counts)} counts for {len(experts)} experts")
    require(min(counts) >= 1, "every expert needs at least one row")
    rows = _rows(blobs, limits)
    if sum(counts) != rows:
        raise ProtocolError(f"counts sum to {sum(counts)}, the blob has {rows} rows")
    if message.runs:
        _runs(message.runs, counts)
    _refs(message.leaving, limits)
    if not 0.0 < message.ttl_s <= limits.max_ttl_s:
        raise ProtocolError(f"ttl_s {message.ttl_s} is not in (0, {limits.max_ttl_s}]")


def _runs(runs: Sequence[int], counts: Sequence[int]) -> None:
    """Runs cut the rows anew, and never across the border between two experts. There are no more of them than rows."""
    require(min(runs) >= 1, "every run needs at least one row")
    if sum(runs) != sum(counts):
        raise ProtocolError(f"runs sum to {sum(runs)}, counts to {sum(counts)}")
    require(set(accumulate(counts)) <= set(accumulate(runs)), "a run goes from one expert to the next")


def _tokens(tokens: Sequence[int], limits: Limits) -> None:
    require(len(tokens) <= limits.max_tokens, "too many tokens")
    if tokens:
        _count(min(tokens), "token", bound=1 << 31)
        _count(max(tokens), "token", bound=1 << 31)


def _result(message: m.Result, blobs: Sequence[BlobSpec], limits: Limits) -> None:
    _count(message.request_id, "request_id")
    _layer(message.layer, limits)
    _experts([timing.expert for timing in message.timings], limits)
    for timing in message.timings:
        _duration(timing.wait_s, "wait_s")
        _duration(timing.compute_s, "compute_s")
    _refs(message.held, limits)
    require(len(message.loaded) <= m.MAX_LOADED_TOLD, f"tells of {len(message.loaded)} loads")
    for loaded in message.loaded:
        _loaded(loaded, limits)
    _rows(blobs, limits)


def _align(message: m.Align, blobs: Sequence[BlobSpec], limits: Limits) -> None:
    _count(message.sequence, "sequence")
    _count(message.position, "position", bound=limits.max_position)
    _tokens(message.tokens, limits)
    require(len(message.cache) <= limits.max_layers, "too many cache layers")
    start = 0
    for layer in message.cache:
        _cache_layer(layer, blobs[start : start + layer.blobs] if layer.blobs >= 0 else (), limits)
        start += layer.blobs
    require(start == len(blobs), f"{len(blobs)} blobs, the cache layers name {start}")


def _cache_layer(layer: m.CacheLayer, blobs: Sequence[BlobSpec], limits: Limits) -> None:
    _count(layer.rows, "rows", bound=limits.max_position)
    _count(layer.length, "length", bound=limits.max_position)
    require(layer.blobs == len(blobs), f"a cache layer names {layer.blobs} blobs, {len(blobs)} are left")
    if layer.kind == "kv":
        require(layer.blobs == 2, f"a kv layer has keys and values, not {layer.blobs} blobs")
        for blob in blobs:
            shape = blob.shape
            if len(shape) != 4 or shape[0] != 1 or shape[2] != layer.rows:
                raise ProtocolError(f"kv blob {list(shape)} is not [1, heads, {layer.rows}, dim]")


def _routed(message: m.Routed, blobs: Sequence[BlobSpec], limits: Limits) -> None:
    _span(message.span, limits)
    _layer(message.layer, limits)
    _experts(message.experts, limits)
    if blobs:
        rows = _rows(blobs, limits)
        require(rows == message.span.length, f"{rows} rows for a span of {message.span.length}")


def _hello(message: m.Hello, limits: Limits) -> None:
    _peer_id(message.peer_id)
    _count(message.incarnation, "incarnation")
    _text(message.package_version, limits)
    require(_DIGEST.fullmatch(message.store_digest) is not None, "store_digest is not a digest")
    _count(message.slots, "slots")
    _count(message.budget_bytes, "budget_bytes")
    _count(message.load_us, "load_us")


def _report(message: m.SlotReport | m.ShadowReport, limits: Limits) -> None:
    for name in message.__struct_fields__:
        value = getattr(message, name)
        if isinstance(value, list):
            require(len(value) == len(m.LOAD_BOUNDS_S) + 1, f"{len(value)} {name}")
            for count in value:
                _count(count, name)
        elif isinstance(value, float):
            _duration(value, name)
        else:
            _count(value, name)


def _view(message: m.View, limits: Limits) -> None:
    members = message.members
    require(len(members) <= limits.max_members, "too many members")
    for member in members:
        _peer_id(member.node_id)
        require(1 <= member.slots < NUMBER_BOUND, f"a member with {member.slots} slots")
        _count(member.load_us, "load_us")
    require(len({member.node_id for member in members}) == len(members), "a member named twice")
    require(1 <= message.group_size <= limits.max_members, f"group_size {message.group_size}")


def _welcome(message: m.Welcome, limits: Limits) -> None:
    _duration(message.heartbeat_s, "heartbeat_s")
    _duration(message.lost_after_s, "lost_after_s")
    require(0.0 < message.heartbeat_s < message.lost_after_s, "needs 0 < heartbeat_s < lost_after_s")


def _compute_failed(message: m.ComputeFailed, limits: Limits) -> None:
    _count(message.request_id, "request_id")
    _text(message.reason, limits)


def _loaded(message: m.Loaded, limits: Limits) -> None:
    _layer(message.layer, limits)
    _experts((message.expert,), limits)
    _duration(message.load_s, "load_s")
    _duration(message.ago_s, "ago_s")
    _count(message.load_bytes, "load_bytes")
    _refs(message.held, limits)


def _load_failed(message: m.LoadFailed, limits: Limits) -> None:
    _layer(message.layer, limits)
    _experts((message.expert,), limits)
    _text(message.reason, limits)


def _schedule(message: m.Schedule, limits: Limits) -> None:
    _span(message.span, limits)
    _layer(message.layer, limits)
    _experts(message.experts, limits)
    _tokens(message.tokens, limits)
    num_tokens = len(message.tokens)
    require(num_tokens <= message.span.length, f"{num_tokens} tokens for a span of {message.span.length}")


def _load(message: m.Load, limits: Limits) -> None:
    _spans(message.spans, limits)
    _layer(message.layer, limits)
    _experts(message.experts, limits)
    _refs(message.leaving, limits)


def _release(message: m.Release, limits: Limits) -> None:
    _spans(message.spans, limits)
    _layer(message.layer, limits)


def _rollback(message: m.Rollback, limits: Limits) -> None:
    _count(message.sequence, "sequence")
    _count(message.position, "position", bound=limits.max_position)


def _heartbeat(message: m.Heartbeat, limits: Limits) -> None:
    _count(message.count, "count")


def _sequence(message: m.Start | m.End | m.Cancel, limits: Limits) -> None:
    _count(message.sequence, "sequence")


def _withdraw(message: m.Withdraw, limits: Limits) -> None:
    _count(message.request_id, "request_id")


def _reason(message: m.Bye | m.Refused | m.ProtocolErrorNotice, limits: Limits) -> None:
    _text(message.reason, limits)


_WITH_BLOBS: dict[type, Callable[[Any, Sequence[BlobSpec], Limits], None]] = {
    m.Compute: _compute,
    m.Result: _result,
    m.Align: _align,
    m.Routed: _routed,
}
_WITHOUT_BLOBS: dict[type, Callable[[Any, Limits], None]] = {
    m.Bye: _reason,
    m.Cancel: _sequence,
    m.ComputeFailed: _compute_failed,
    m.End: _sequence,
    m.Heartbeat: _heartbeat,
    m.Hello: _hello,
    m.Load: _load,
    m.LoadFailed: _load_failed,
    m.Loaded: _loaded,
    m.ProtocolErrorNotice: _reason,
    m.Refused: _reason,
    m.Release: _release,
    m.Rollback: _rollback,
    m.Schedule: _schedule,
    m.ShadowReport: _report,
    m.SlotReport: _report,
    m.Start: _sequence,
    m.View: _view,
    m.Welcome: _welcome,
    m.Withdraw: _withdraw,
}


def check_message(message: m.AnyMessage, blobs: Sequence[BlobSpec], limits: Limits) -> None:
    """Raise `ProtocolError` unless the message, and its blobs' specs with it, make sense within the limits."""
    with_blobs = _WITH_BLOBS.get(type(message))
    if with_blobs is not None:
        with_blobs(message, blobs, limits)
        return
    require(not blobs, f"{type(message).__name__} carries no blobs, {len(blobs)} came")
    _WITHOUT_BLOBS[type(message)](message, limits)
