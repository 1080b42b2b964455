"""The caches of several sequences as one, for a forward that takes one token of each. Knows no model and no alignment.

Every sequence ends in the last slot, the shorter ones begin later; what lies before a sequence's beginning is zero and
has to be masked. For caches of growing keys and values only.

Shape suffixes: B sequences, h key-value heads, S slots, D head dimension.
"""

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

# Sequences in one forward: more of them keep the first ones waiting for longer.
MOST_TOGETHER: Final = 16
# Slots may be as many times those that hold something, beyond what nobody minds.
MOST_SPREAD: Final = 1.5
FREE_SLOTS: Final = 512


def is_plain(cache: DynamicCache) -> bool:
    """Whether the cache holds keys and values of all its positions, and nothing else. Exact classes only: a subclass
    has more to carry."""
    return all(type(layer) is DynamicLayer and layer.is_initialized for layer in cache.layers)


def companions(lengths: Sequence[int]) -> list[int]:
    """Which of the sequences, named by their place, go into one forward: the first, and in their order those whose
    lengths waste no more room than is allowed."""
    chosen = [0]
    for place in range(1, len(lengths)):
        inside = [lengths[at] for at in (*chosen, place)]
        if len(inside) * max(inside) <= MOST_SPREAD * sum(inside) + FREE_SLOTS and len(inside) <= MOST_TOGETHER:
            chosen.append(place)
    return chosen


class RaggedLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers' types are not followed
    """One layer of several caches. They are left as they are until `give_back`."""

    is_sliding = False

    def __init__(self, parts: Sequence[DynamicLayer], *, width: int) -> None:
        super().__init__()
        self._parts, self._width = parts, width
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: `update` takes the room."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """The new position [B, h, 1, D] behind those that are there: [B, h, S, D]."""
        self.keys = self._joined([part.keys for part in self._parts], key_states)
        self.values = self._joined([part.values for part in self._parts], value_states)
        return self.keys, self.values

    def give_back(self, row: int) -> None:
        """Let the sequence have its new position. What it gets is a part of all sequences' tensor."""
        part = self._parts[row]
        first = self._width - part.keys.shape[-2]
        part.keys = self.keys[row : row + 1, :, first:]
        part.values = self.values[row : row + 1, :, first:]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Slots there will be, and the first of them."""
        return self._width + query_length, 0

    def get_seq_length(self) -> int:
        """Slots before the new position."""
        return self._width

    def get_max_length(self) -> int:
        """There is no end."""
        return -1

    def _joined(self, own: Sequence[Tensor], new_Bh1D: Tensor) -> Tensor:
        size, heads, _, dim = new_Bh1D.shape
        joined_BhSD = new_Bh1D.new_zeros(size, heads, self._width + 1, dim)
        for row, rows_1hSD in enumerate(own):
            joined_BhSD[row, :, self._width - rows_1hSD.shape[-2] : self._width] = rows_1hSD[0]
        joined_BhSD[:, :, self._width :] = new_Bh1D
        return joined_BhSD


class RaggedCache(Cache):  # type: ignore[misc]  # transformers' types are not followed
    """Of caches that are all `is_plain` and of one model."""

    def __init__(self, caches: Sequence[DynamicCache]) -> None:
        self.lengths: list[int] = [cache.get_seq_length() for cache in caches]
        width = max(self.lengths)
        layers = zip(*(cache.layers for cache in caches), strict=True)
        super().__init__(layers=[RaggedLayer(parts, width=width) for parts in layers])

    def seen(self) -> Tensor:
        """Which slots hold something, bool [B, S], the new position's included."""
        lengths_B = torch.tensor(self.lengths)
        return torch.arange(max(self.lengths) + 1) >= max(self.lengths) - lengths_B[:, None]

    def positions(self) -> Tensor:
        """Those of the new tokens, int64 [B, 1]."""
        return torch.tensor(self.lengths)[:, None]

    def give_back(self, row: int) -> None:
        """Let a sequence keep what the forward made of its token."""
        for layer in self.layers:
            layer.give_back(row)
