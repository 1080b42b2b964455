"""Keys and values of prompt heads that came before, to be used again by prompts that begin alike.

Only whole chunks are shared: what a chunk leaves in the cache depends on its own tokens and those before it, to the
bit, whereas another cut would round differently. So an answer does not depend on whether its head was found here. What
one tenant sent is never found by another, or the time to the first token would tell what others asked.

Knows caches of growing keys and values; a model with windows or states has nothing that can be cut back and is not
served.
"""

from collections import OrderedDict
from dataclasses import dataclass, field

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from odmoe_model.kvcache import cache_bytes


@dataclass(frozen=True, kw_only=True)
class Head:
    """The first tokens of a prompt and what they left in the cache."""

    ids: tuple[int, ...]
    layers: tuple[DynamicLayer, ...]
    size_bytes: int


@dataclass(kw_only=True)
class PrefixCache:
    """Used by the decode loop's thread only. The head used longest ago goes first when `budget_bytes` are exceeded."""

    budget_bytes: int
    chunk: int
    _heads: "OrderedDict[tuple[str, tuple[int, ...]], Head]" = field(default_factory=OrderedDict)

    @property
    def used_bytes(self) -> int:
        """Of all heads."""
        return sum(head.size_bytes for head in self._heads.values())

    def find(self, tenant: str, prompt_ids: tuple[int, ...], cache: DynamicCache) -> int:
        """Fill an empty cache with the longest head that the prompt begins with; how many tokens that is. At least one
        token of the prompt is left to compute."""
        longest, best = 0, None
        for (owner, _), head in self._heads.items():
            shared = self._shared(head.ids, prompt_ids) if owner == tenant else 0
            if shared > longest:
                longest, best = shared, head
        if best is None:
            return 0
        self._heads.move_to_end((tenant, best.ids))
        for layer, kept in zip(cache.layers, best.layers, strict=True):
            layer.lazy_initialization(kept.keys, kept.values)
            # The model appends by making new tensors, so what is kept here stays as it is.
            layer.keys, layer.values = kept.keys[..., :longest, :], kept.values[..., :longest, :]
        return longest

    def keep(self, tenant: str, prompt_ids: tuple[int, ...], cache: DynamicCache) -> None:
        """Remember what the whole chunks of a prompt left in the cache, which holds exactly these."""
        length = cache.get_seq_length()
        if length == 0 or length % self.chunk or not all(type(layer) is DynamicLayer for layer in cache.layers):
            return
        ids = prompt_ids[:length]
        size_bytes = cache_bytes(cache)
        if size_bytes > self.budget_bytes:
            return
        for key in [key for key in self._heads if key[0] == tenant and ids[: len(key[1])] == key[1]]:
            del self._heads[key]  # the new one begins with it
        self._heads[tenant, ids] = Head(
            ids=ids, layers=tuple(_copy(layer) for layer in cache.layers), size_bytes=size_bytes
        )
        self.shrink(self.budget_bytes)

    def shrink(self, most_bytes: int) -> None:
        """Let go of heads until so much is left."""
        while self._heads and self.used_bytes > most_bytes:
            self._heads.popitem(last=False)

    def _shared(self, head: tuple[int, ...], prompt_ids: tuple[int, ...]) -> int:
        """How many whole chunks' tokens both begin with."""
        most = min(len(head), len(prompt_ids) - 1) // self.chunk * self.chunk
        for start in range(0, most, self.chunk):
            if head[start : start + self.chunk] != prompt_ids[start : start + self.chunk]:
                return start
        return most


def _copy(layer: DynamicLayer) -> DynamicLayer:
    """Another holder of the same tensors."""
    kept = DynamicLayer()
    kept.lazy_initialization(layer.keys, layer.values)
    kept.keys, kept.values = layer.keys, layer.values
    return kept
