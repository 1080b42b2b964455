"""Prompt heads that come again: found, whole chunks only, per tenant, and bounded."""

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from odmoe_server.engine.prefix import PrefixCache

CHUNK = 4
PROMPT = tuple(range(1, 11))


def filled(length: int, *, layers: int = 2) -> DynamicCache:
    """A cache whose keys say which position they are of."""
    cache = DynamicCache()
    for layer in range(layers):
        rows = torch.arange(length, dtype=torch.float32).view(1, 1, length, 1).expand(1, 2, length, 3)
        cache.update(rows + 100 * layer, -rows, layer)
    return cache


def empty(*, layers: int = 2) -> DynamicCache:
    cache = DynamicCache()
    cache.layers = [DynamicLayer() for _ in range(layers)]
    return cache


def prefix(budget_bytes: int = 1 << 20) -> PrefixCache:
    return PrefixCache(budget_bytes=budget_bytes, chunk=CHUNK)


def test_a_head_is_found_again_with_its_keys_and_values() -> None:
    heads, cache = prefix(), empty()
    heads.keep("t", PROMPT, filled(8))
    assert heads.find("t", (*PROMPT[:8], 99, 98), cache) == 8
    assert cache.get_seq_length() == 8
    assert torch.equal(cache.layers[1].keys, filled(8).layers[1].keys)


def test_only_whole_chunks_count_and_one_token_is_left_to_compute() -> None:
    heads = prefix()
    heads.keep("t", PROMPT, filled(8))
    assert heads.find("t", (*PROMPT[:7], 99, 98), empty()) == 4
    assert heads.find("t", PROMPT[:8], empty()) == 4
    assert heads.find("t", PROMPT[:4], empty()) == 0
    assert heads.find("t", (99, *PROMPT[1:]), empty()) == 0


def test_what_is_found_is_not_changed_by_who_goes_on_with_it() -> None:
    heads, cache = prefix(), empty()
    heads.keep("t", PROMPT, filled(8))
    heads.find("t", PROMPT, cache)
    cache.update(torch.ones(1, 2, 1, 3), torch.ones(1, 2, 1, 3), 0)
    again = empty()
    assert heads.find("t", PROMPT, again) == 8
    assert torch.equal(again.layers[0].keys, filled(8).layers[0].keys)


def test_a_prompt_that_ends_within_a_chunk_is_not_kept() -> None:
    heads = prefix()
    heads.keep("t", PROMPT, filled(10))
    assert heads.used_bytes == 0


def test_tenants_do_not_find_one_anothers() -> None:
    heads = prefix()
    heads.keep("t", PROMPT, filled(8))
    assert heads.find("u", PROMPT, empty()) == 0


def test_the_longer_head_replaces_the_one_it_begins_with_and_the_oldest_goes_first() -> None:
    size = 2 * 2 * 2 * 3 * 4  # bytes a position
    heads = prefix(budget_bytes=20 * size)
    heads.keep("t", PROMPT, filled(4))
    heads.keep("t", PROMPT, filled(8))
    assert heads.used_bytes == 8 * size
    heads.keep("t", (7,) * 8, filled(8))
    assert heads.find("t", PROMPT, empty()) == 8  # used again, so it is the other that goes
    heads.keep("t", (8,) * 8, filled(8))
    assert heads.used_bytes == 16 * size
    assert heads.find("t", (7,) * 9, empty()) == 0
    assert heads.find("t", PROMPT, empty()) == 8
    heads.shrink(8 * size)
    assert heads.used_bytes == 8 * size


def test_what_does_not_fit_at_all_is_not_kept() -> None:
    heads = prefix(budget_bytes=10)
    heads.keep("t", PROMPT, filled(8))
    assert heads.used_bytes == 0
