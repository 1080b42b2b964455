"""Keys and values of many sequences side by side, in room taken once. Knows no model and no alignment.

A slot is a place along the sequence axis, the same for all sequences: prompts end together, the shorter ones begin
later. What lies before a sequence's beginning is zero and has to be masked.

Shape suffixes: B sequences of the batch, h key-value heads, T new positions, S slots, D head dimension.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer


class Slab(CacheLayerMixin):  # type: ignore[misc]  # transformers' types are not followed
    """The keys and values [B, h, S, D] of a layer, of which the first `length` slots are filled. A window, if the
    layer has one, is the mask's business."""

    is_sliding = False

    def __init__(self, *, slots: int) -> None:
        super().__init__()
        self.slots, self.length = slots, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the room, for as many sequences as the given ones have."""
        self.keys, self.values = (
            states.new_zeros(*states.shape[:-2], self.slots, states.shape[-1]) for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Put [B, h, T, D] into the next slots; all filled ones."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        first, self.length = self.length, self.length + key_states.shape[-2]
        self.keys[:, :, first : self.length] = key_states
        self.values[:, :, first : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Slots there will be, and the first of them."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Filled slots."""
        return self.length

    def get_max_length(self) -> int:
        """All slots."""
        return self.slots


class SlabCache(Cache):  # type: ignore[misc]  # transformers' types are not followed
    """A slab for each layer of a model whose cache is nothing but keys and values."""

    def __init__(self, *, num_layers: int, slots: int) -> None:
        super().__init__(layers=[Slab(slots=slots) for _ in range(num_layers)])

    @classmethod
    def for_model(cls, config: Any, *, slots: int) -> "SlabCache":
        """Empty, for a model of the (transformers) configuration. Raises ValueError when it keeps anything else."""
        layers = DynamicCache(config=config).layers
        strange = {type(layer).__name__ for layer in layers} - {
            DynamicLayer.__name__,
            DynamicSlidingWindowLayer.__name__,
        }
        if strange:
            raise ValueError(f"recall is measured in lockstep, which is not there for a cache of {sorted(strange)}")
        return cls(num_layers=len(layers), slots=slots)

    @classmethod
    def like(cls, other: "SlabCache", *, batch: int, slots: int) -> "SlabCache":
        """Zeros for a model of `other`'s kind and `batch` sequences."""
        cache = cls(num_layers=len(other.layers), slots=slots)
        for mine, its in zip(cache.layers, other.layers, strict=True):
            mine.lazy_initialization(*(states[:1].expand(batch, -1, -1, -1) for states in (its.keys, its.values)))
        return cache

    def fill_to(self, length: int) -> None:
        """Count the first `length` slots as filled."""
        for layer in self.layers:
            layer.length = length

    def keep(self, kept: Tensor) -> None:
        """Go on with these sequences only, int64 indices."""
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[kept], layer.values[kept]

    def take(self, other: "SlabCache", *, rows: Tensor, to: int, first: int, end: int) -> None:
        """Copy the slots from `first` up to `end` of the other's sequences `rows`, int64, over one's own sequences
        from `to` on."""
        for mine, its in _pairs(self, other):
            mine[to : to + len(rows), :, first:end] = its[rows, :, first:end]

    def put(self, other: "SlabCache", *, rows: Tensor, first: int, end: int, at: int) -> None:
        """Copy the other's slots from `first` up to `end` to one's own sequences `rows`, from slot `at` on."""
        for mine, its in _pairs(self, other):
            mine[rows, :, at : at + end - first] = its[:, :, first:end]


def _pairs(mine: SlabCache, its: SlabCache) -> Iterable[tuple[Tensor, Tensor]]:
    for one, other in zip(mine.layers, its.layers, strict=True):
        yield one.keys, other.keys
        yield one.values, other.values
