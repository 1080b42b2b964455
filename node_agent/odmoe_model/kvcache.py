"""The newest positions of a transformers cache taken out of one model and put into another's of the same kind.

Covers what the supported families' caches are made of: growing keys and values, those of a sliding window, and
the state of a short convolution. Batch of one. Knows nothing of messages' transport or of who is aligned with whom.

Shape suffixes: B batch (1), h key-value heads, R positions, D head dimension (K's and V's may differ),
C channels, W width of a convolution's state.
"""

from collections.abc import Sequence
from itertools import islice
from typing import Any, Final

import torch
from torch import Tensor
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from odmoe_wire.messages import CacheLayer

# How far back `truncate_cache` can go in a layer that forgets, in a cache prepared by `new_cache`.
KEPT_POSITIONS: Final = 64
_KV_BLOBS: Final = 2

# The attributes of each layer of a cache.
Snapshot = list[dict[str, Any]]


class CacheError(ValueError):
    """The cache cannot be exported, imported into or cut back as asked; it was not changed."""


def new_cache(config: Any) -> DynamicCache:
    """An empty cache for a model of the (transformers) configuration, whose windows and states keep at least
    `KEPT_POSITIONS` more than they need when `trim_cache` is called after each change."""
    cache = DynamicCache(config=config)
    cache.activate_past_recording()
    return cache


def export_cache(cache: DynamicCache, *, rows: int) -> tuple[list[CacheLayer], list[Tensor]]:
    """What the newest `rows` positions put into the cache: an entry a decoder layer, and its tensors in that order.

    Keys and values [1, h, R, D], R <= rows (a sliding window has no more to give); the whole state [1, C, W] of
    a convolution. The tensors are not changed by what the model does next. Raises CacheError for a kind of cache
    layer that no supported family has, and for one that was never filled."""
    length = cache.get_seq_length()
    layers: list[CacheLayer] = []
    tensors: list[Tensor] = []
    for index, layer in enumerate(cache.layers):
        kind = _kind(layer, index)
        taken = _export_kv(layer, rows) if kind == "kv" else _export_state(layer)
        if not taken:
            raise CacheError(f"layer {index} of the cache holds nothing yet")
        num_rows = taken[0].shape[-2] if kind == "kv" else 0
        layers.append(CacheLayer(kind=kind, rows=num_rows, length=length, blobs=len(taken)))
        tensors.extend(taken)
    return layers, tensors


def import_cache(
    cache: DynamicCache, layers: Sequence[CacheLayer], tensors: Sequence[Tensor], *, keep: int = 0
) -> None:
    """Bring the cache to the state the entries describe: own positions from the first imported one on are
    replaced, those before it kept. Tensors are taken as they are (dtype and device are the caller's business).
    The newest `keep` own positions stay behind the imported ones, which must reach up to them; keys and values are
    then written into the own tensors, so that it costs no more than the rows that came.

    Raises CacheError, with the cache unchanged, when the entries do not fit it or leave a gap."""
    _check_entries(cache, layers, tensors)
    if keep and (not layers or keep != cache.get_seq_length() - layers[0].length):
        raise CacheError(f"{keep} positions of a cache of {cache.get_seq_length()} do not follow the imported ones")
    given = _by_layer(cache, layers, tensors)
    if keep:
        _import_underneath(given, keep)
        return
    plans = [
        (layer, entry, _merged_kv(layer, entry, brought, index) if entry.kind == "kv" else brought)
        for index, (layer, entry, brought) in enumerate(given)
    ]
    for layer, entry, merged in plans:
        if entry.kind == "kv":
            _set_kv(layer, merged[0], merged[1], length=entry.length)
        else:
            _set_state(layer, merged[0])


def truncate_cache(cache: DynamicCache, *, length: int) -> None:
    """Forget every position from `length` on. Raises CacheError when a window or a state has forgotten what it
    would need for that (`KEPT_POSITIONS`), or `length` is beyond the end."""
    removed = cache.get_seq_length() - length
    if removed < 0 or length < 0:
        raise CacheError(f"a cache of {cache.get_seq_length()} positions cannot be cut to {length}")
    if removed == 0:
        return
    for index, layer in enumerate(cache.layers):
        if not _can_forget(layer, removed, length):
            raise CacheError(f"layer {index} of the cache cannot go back by {removed} positions to {length}")
    for layer in cache.layers:
        if length == 0:
            _forget_state(layer)
            layer.reset()
        elif isinstance(layer, LinearAttentionLayer):
            layer.conv_states[0] = layer.conv_states[0][..., :-removed]
        else:
            _set_kv(layer, layer.keys[..., :-removed, :], layer.values[..., :-removed, :], length=length)


def trim_cache(cache: DynamicCache) -> None:
    """Drop what no step and no `truncate_cache` by up to `KEPT_POSITIONS` needs. For caches of `new_cache`."""
    for layer in cache.layers:
        if isinstance(layer, LinearAttentionLayer):
            if layer.conv_states[0] is not None:
                kept = layer.conv_kernel_size[0] + KEPT_POSITIONS
                layer.conv_states[0] = layer.conv_states[0][..., -kept:]
        elif isinstance(layer, DynamicSlidingWindowLayer) and layer.is_initialized:
            kept = layer.sliding_window - 1 + KEPT_POSITIONS
            layer.keys, layer.values = layer.keys[..., -kept:, :], layer.values[..., -kept:, :]


def snapshot_cache(cache: DynamicCache) -> Snapshot:
    """What `restore_cache` needs to undo a forward that was given up midway. Costs no copy: in a cache of
    `new_cache` the model replaces tensors and never writes into them."""
    return [
        {name: dict(value) if isinstance(value, dict) else value for name, value in vars(layer).items()}
        for layer in cache.layers
    ]


def restore_cache(cache: DynamicCache, snapshot: Snapshot) -> None:
    """Put the cache back to where `snapshot_cache` found it; a snapshot is good for one time."""
    for layer, saved in zip(cache.layers, snapshot, strict=True):
        vars(layer).update(saved)


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes of everything the cache holds, each tensor counted by its own elements."""
    held = 0
    for layer in cache.layers:
        tensors = layer.conv_states.values() if isinstance(layer, LinearAttentionLayer) else (layer.keys, layer.values)
        held += sum(tensor.nbytes for tensor in tensors if tensor is not None)
    return held


def _kind(layer: Any, index: int) -> Any:
    """Exact classes only: a subclass has more to carry than is carried here."""
    if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
        return "kv"
    if type(layer) is LinearAttentionLayer and layer.number_of_states == 1:
        if any(layer.is_recurrent_states_initialized.values()):
            raise CacheError(f"layer {index} of the cache has a recurrent state, which cannot be aligned yet")
        return "state"
    raise CacheError(f"layer {index} of the cache is a {type(layer).__name__}, which cannot be aligned yet")


def _export_kv(layer: Any, rows: int) -> list[Tensor]:
    if not layer.is_initialized:
        return []
    stored = layer.keys.shape[-2]
    taken = min(rows, stored)
    if isinstance(layer, DynamicSlidingWindowLayer):
        taken = min(taken, layer.sliding_window - 1)
    # Contiguous, so that a few rows on their way do not keep the whole cache alive.
    return [tensor[..., stored - taken :, :].contiguous() for tensor in (layer.keys, layer.values)]


def _export_state(layer: Any) -> list[Tensor]:
    if not layer.has_previous_state[0]:
        return []
    state_BCW = layer.conv_states[0][..., -layer.conv_kernel_size[0] :]
    missing = layer.conv_kernel_size[0] - state_BCW.shape[-1]
    # Padding copies; so must the other case, since the model updates its state in place.
    return [torch.nn.functional.pad(state_BCW, (missing, 0)) if missing else state_BCW.clone()]


def _check_entries(cache: DynamicCache, layers: Sequence[CacheLayer], tensors: Sequence[Tensor]) -> None:
    if len(layers) != len(cache.layers):
        raise CacheError(f"{len(layers)} layers of a cache for a model of {len(cache.layers)}")
    if sum(entry.blobs for entry in layers) != len(tensors):
        raise CacheError(f"{len(tensors)} tensors do not fit the cache's layers")
    if len({entry.length for entry in layers}) != 1:
        raise CacheError("the layers of a cache must all have the same length")
    start = 0
    for index, (layer, entry) in enumerate(zip(cache.layers, layers, strict=True)):
        given = tensors[start : start + entry.blobs]
        start += entry.blobs
        expected_dims, blobs = (4, _KV_BLOBS) if entry.kind == "kv" else (3, 1)
        if entry.kind != _kind(layer, index) or entry.blobs != blobs:
            raise CacheError(f"layer {index}: {entry.blobs} tensors of kind {entry.kind} do not belong there")
        if any(tensor.ndim != expected_dims or tensor.shape[0] != 1 for tensor in given):
            raise CacheError(f"layer {index}: the shape of a tensor does not fit")


def _by_layer(
    cache: DynamicCache, layers: Sequence[CacheLayer], tensors: Sequence[Tensor]
) -> list[tuple[Any, CacheLayer, list[Tensor]]]:
    """Each layer of the cache, what comes for it, and the tensors that brings."""
    left = iter(tensors)
    return [(layer, entry, list(islice(left, entry.blobs))) for layer, entry in zip(cache.layers, layers, strict=True)]


@torch.inference_mode()
def _import_underneath(given: Sequence[tuple[Any, CacheLayer, list[Tensor]]], keep: int) -> None:
    """Replace what lies before the newest `keep` positions. A forward has put those there, and with them the whole
    tensors of the cache, so nobody else reads what is written to."""
    plans = [
        (_own_region(layer, entry, brought, index, keep=keep), layer, brought)
        for index, (layer, entry, brought) in enumerate(given)
    ]
    for region, layer, brought in plans:
        if isinstance(layer, LinearAttentionLayer):
            layer.conv_states[0] = torch.cat([brought[0], region[0]], dim=-1)
            continue
        for own, new in zip(region, brought, strict=True):
            own.copy_(new[..., new.shape[-2] - own.shape[-2] :, :])


def _own_region(layer: Any, entry: CacheLayer, given: Sequence[Tensor], index: int, *, keep: int) -> list[Tensor]:
    """Where in the own keys and values the given rows belong, as far back as there are any; of a state, the newest
    positions, which are to follow it. Raises CacheError."""
    own = [layer.conv_states[0]] if isinstance(layer, LinearAttentionLayer) else [layer.keys, layer.values]
    if isinstance(layer, LinearAttentionLayer):
        if own[0].shape[-1] < keep or own[0].shape[:2] != given[0].shape[:2] or own[0].dtype != given[0].dtype:
            raise CacheError(f"layer {index}: {keep} positions cannot follow a state of {list(given[0].shape)}")
        return [own[0][..., own[0].shape[-1] - keep :]]
    end = own[0].shape[-2] - keep
    if end < 0 or any(new.shape[-2] != entry.rows for new in given):
        raise CacheError(f"layer {index}: {entry.rows} rows cannot lie before {keep} of {own[0].shape[-2]} positions")
    for mine, new in zip(own, given, strict=True):
        if mine.shape[1] != new.shape[1] or mine.shape[3] != new.shape[3] or mine.dtype != new.dtype:
            raise CacheError(f"layer {index}: {list(new.shape)} rows do not fit a cache of {list(mine.shape)}")
    return [mine[..., max(0, end - entry.rows) : end, :] for mine in own]


def _merged_kv(layer: Any, entry: CacheLayer, given: Sequence[Tensor], index: int) -> list[Tensor]:
    """Own positions before the imported ones, then those."""
    first = entry.length - entry.rows
    if first < 0 or any(tensor.shape[-2] != entry.rows for tensor in given):
        raise CacheError(f"layer {index}: {entry.rows} rows cannot end at position {entry.length}")
    window = layer.sliding_window - 1 if isinstance(layer, DynamicSlidingWindowLayer) else entry.length
    if not layer.is_initialized:
        if entry.rows < min(window, entry.length):
            raise CacheError(f"layer {index}: the cache is empty and {entry.rows} of {entry.length} rows came")
        return list(given)
    own_length, stored = layer.get_seq_length(), layer.keys.shape[-2]
    kept = stored - (own_length - first)
    if first > own_length or kept + entry.rows < min(window, entry.length):
        raise CacheError(f"layer {index}: a gap between the cache's {own_length} positions and {first}")
    if kept <= 0:
        return list(given)
    merged = []
    for own, new in zip((layer.keys, layer.values), given, strict=True):
        if own.shape[1] != new.shape[1] or own.shape[3] != new.shape[3] or own.dtype != new.dtype:
            raise CacheError(f"layer {index}: {list(new.shape)} rows do not fit a cache of {list(own.shape)}")
        merged.append(torch.cat([own[..., :kept, :], new], dim=-2))
    if isinstance(layer, DynamicSlidingWindowLayer) and not layer.record_past:
        merged = [tensor[..., -window:, :] for tensor in merged]
    return merged


def _set_kv(layer: Any, keys_BhRD: Tensor, values_BhRD: Tensor, *, length: int) -> None:
    if not layer.is_initialized:
        layer.lazy_initialization(keys_BhRD, values_BhRD)
    layer.keys, layer.values = keys_BhRD, values_BhRD
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = length


def _set_state(layer: Any, state_BCW: Tensor) -> None:
    if not layer.is_conv_states_initialized[0]:
        layer.lazy_initialization(conv_states=state_BCW, state_idx=0)
    # A copy: the model updates its state in place, and the imported tensor is not ours.
    layer.conv_states[0] = state_BCW.clone()
    layer.has_previous_state[0] = True


def _can_forget(layer: Any, removed: int, length: int) -> bool:
    if length == 0:
        return True
    if isinstance(layer, LinearAttentionLayer):
        return bool(layer.conv_states[0].shape[-1] - removed >= min(layer.conv_kernel_size[0], length))
    needed = min(length, layer.sliding_window - 1) if isinstance(layer, DynamicSlidingWindowLayer) else length
    return bool(layer.keys.shape[-2] - removed >= needed)


def _forget_state(layer: Any) -> None:
    """Let go of a state before `reset`, which would write zeros into it."""
    if isinstance(layer, LinearAttentionLayer):
        layer.conv_states[0] = None
        layer.is_conv_states_initialized[0] = False
