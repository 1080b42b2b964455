"""A cache carried from one model's to another's: the receiving model cannot tell the difference."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from odmoe_model.kvcache import (
    KEPT_POSITIONS,
    CacheError,
    cache_bytes,
    export_cache,
    import_cache,
    new_cache,
    restore_cache,
    snapshot_cache,
    trim_cache,
    truncate_cache,
)
from support.tiny import FAMILIES, tiny_model

PROMPTS = {"longer than every window": 21, "shorter than a convolution": 2}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param)


def plain_cache(model: Any) -> DynamicCache:
    return DynamicCache(config=model.config)


def feed(model: Any, cache: DynamicCache, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([tokens]), past_key_values=cache, use_cache=True).logits[0]


def prompt(length: int, *, seed: int = 0) -> list[int]:
    return torch.randint(0, 128, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("length", PROMPTS.values(), ids=PROMPTS)
def test_whole_prompt_into_a_fresh_cache_gives_the_same_bits(model: Any, length: int) -> None:
    full, shadow = plain_cache(model), plain_cache(model)
    feed(model, full, prompt(length))
    import_cache(shadow, *export_cache(full, rows=length))
    assert shadow.get_seq_length() == length
    assert torch.equal(feed(model, full, [5]), feed(model, shadow, [5]))


@pytest.mark.parametrize("length", PROMPTS.values(), ids=PROMPTS)
def test_row_of_a_wrong_own_token_is_replaced(model: Any, length: int) -> None:
    full, shadow = plain_cache(model), plain_cache(model)
    feed(model, full, prompt(length))
    import_cache(shadow, *export_cache(full, rows=length))
    feed(model, full, [5])
    feed(model, shadow, [99])
    import_cache(shadow, *export_cache(full, rows=1))
    assert shadow.get_seq_length() == length + 1
    assert torch.equal(feed(model, full, [7]), feed(model, shadow, [7]))


def test_alignment_each_step_from_the_first_token_on(model: Any) -> None:
    full, shadow = plain_cache(model), new_cache(model.config)
    for step, token in enumerate(prompt(24)):
        feed(model, full, [token])
        import_cache(shadow, *export_cache(full, rows=1))
        trim_cache(shadow)
        assert shadow.get_seq_length() == step + 1
    feed(model, shadow, [99])
    truncate_or_align(model, full, shadow)


def truncate_or_align(model: Any, full: DynamicCache, shadow: DynamicCache) -> None:
    feed(model, full, [5])
    import_cache(shadow, *export_cache(full, rows=1))
    torch.testing.assert_close(feed(model, full, [7]), feed(model, shadow, [7]))


@pytest.mark.parametrize("keep", [1, 16])
def test_rows_go_underneath_positions_that_are_kept(model: Any, keep: int) -> None:
    full, shadow, other = (plain_cache(model), new_cache(model.config), new_cache(model.config))
    feed(model, full, prompt(21))
    for cache in (shadow, other):
        import_cache(cache, *export_cache(full, rows=21))
        feed(model, cache, prompt(9, seed=3))
        feed(model, cache, prompt(keep, seed=4))
        trim_cache(cache)
    feed(model, full, prompt(9, seed=5))
    import_cache(shadow, *export_cache(full, rows=9), keep=keep)
    assert shadow.get_seq_length() == 30 + keep
    for mine, same in zip(export_cache(shadow, rows=keep)[1], export_cache(other, rows=keep)[1], strict=True):
        newest = -min(keep, mine.shape[-1] if mine.ndim == 3 else mine.shape[-2])
        assert torch.equal(mine[..., newest:], same[..., newest:]) if mine.ndim == 3 else torch.equal(mine, same)
    truncate_cache(shadow, length=30)
    for mine, its in zip(export_cache(shadow, rows=9)[1], export_cache(full, rows=9)[1], strict=True):
        assert torch.equal(mine, its)
    torch.testing.assert_close(feed(model, full, [7]), feed(model, shadow, [7]))


def test_rows_that_cannot_lie_underneath_are_refused_and_change_nothing(model: Any) -> None:
    full, shadow = plain_cache(model), new_cache(model.config)
    feed(model, full, prompt(8))
    import_cache(shadow, *export_cache(full, rows=8))
    feed(model, shadow, [1, 2])
    layers, tensors = export_cache(full, rows=1)
    before = [tensor.clone() for tensor in export_cache(shadow, rows=10)[1]]
    with pytest.raises(CacheError, match="do not follow"):
        import_cache(shadow, layers, tensors, keep=1)
    with pytest.raises(CacheError, match=r"do not fit|cannot follow"):
        import_cache(shadow, layers, [*tensors[:-1], torch.cat([tensors[-1]] * 2, dim=1)], keep=2)
    assert all(torch.equal(mine, was) for mine, was in zip(export_cache(shadow, rows=10)[1], before, strict=True))


def test_skipped_positions_are_caught_up_by_more_rows(model: Any) -> None:
    full, shadow = plain_cache(model), plain_cache(model)
    feed(model, full, prompt(9))
    import_cache(shadow, *export_cache(full, rows=9))
    for token in (3, 4, 6):
        feed(model, full, [token])
    if any(entry.kind == "kv" for entry in export_cache(full, rows=1)[0]):
        before = shadow.get_seq_length()
        with pytest.raises(CacheError, match="gap"):
            import_cache(shadow, *export_cache(full, rows=1))
        assert shadow.get_seq_length() == before
    import_cache(shadow, *export_cache(full, rows=3))
    assert torch.equal(feed(model, full, [5]), feed(model, shadow, [5]))


def test_truncating_gives_the_same_next_step(model: Any) -> None:
    straight, winding = plain_cache(model), new_cache(model.config)
    tokens = prompt(40)
    feed(model, straight, tokens)
    feed(model, winding, tokens)
    trim_cache(winding)
    for wrong in (90, 91, 92, 93, 94):
        feed(model, winding, [wrong])
        trim_cache(winding)
    truncate_cache(winding, length=40)
    assert winding.get_seq_length() == 40
    torch.testing.assert_close(feed(model, straight, [5]), feed(model, winding, [5]))


def test_truncating_to_nothing_is_a_new_start(model: Any) -> None:
    cache = new_cache(model.config)
    feed(model, cache, prompt(5, seed=1))
    truncate_cache(cache, length=0)
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(feed(model, cache, prompt(6)), feed(model, plain_cache(model), prompt(6)))


def test_restoring_a_snapshot_undoes_half_a_forward(model: Any) -> None:
    cache, untouched = new_cache(model.config), new_cache(model.config)
    for each in (cache, untouched):
        feed(model, each, prompt(15))
    saved = snapshot_cache(cache)
    stop_in_last_layer(model, cache)
    restore_cache(cache, saved)
    assert torch.equal(feed(model, cache, [5]), feed(model, untouched, [5]))


def stop_in_last_layer(model: Any, cache: DynamicCache) -> None:
    class StopError(Exception):
        pass

    def stop(*_: Any) -> None:
        raise StopError

    hook = model.base_model.layers[-1].register_forward_pre_hook(stop)
    with pytest.raises(StopError):
        feed(model, cache, [77, 78])
    hook.remove()


def test_what_is_exported_is_not_changed_by_the_next_step(model: Any) -> None:
    cache = plain_cache(model)
    feed(model, cache, prompt(7))
    _, tensors = export_cache(cache, rows=2)
    copies = [tensor.clone() for tensor in tensors]
    feed(model, cache, [5])
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies, strict=True))
    assert all(tensor.is_contiguous() for tensor in tensors)


def test_trimmed_cache_stays_small() -> None:
    model = tiny_model("gpt_oss", layer_types=["sliding_attention"] * 3)
    cache = new_cache(model.config)
    feed(model, cache, prompt(200))
    trim_cache(cache)
    rows = 8 - 1 + KEPT_POSITIONS
    assert cache_bytes(cache) == 3 * 2 * rows * 2 * 16 * 4


def test_truncating_past_what_a_window_kept_is_refused() -> None:
    model = tiny_model("gpt_oss")
    cache = new_cache(model.config)
    feed(model, cache, prompt(200))
    trim_cache(cache)
    with pytest.raises(CacheError, match="cannot go back"):
        truncate_cache(cache, length=200 - KEPT_POSITIONS - 1)
    with pytest.raises(CacheError, match="cannot be cut to 201"):
        truncate_cache(cache, length=201)
    assert cache.get_seq_length() == 200


def test_entries_that_do_not_fit_are_refused_and_change_nothing() -> None:
    model = tiny_model("lfm2_moe")
    full, shadow = plain_cache(model), plain_cache(model)
    feed(model, full, prompt(6))
    layers, tensors = export_cache(full, rows=6)
    import_cache(shadow, layers, tensors)
    wrong_heads = [tensor[:, :1] if tensor.ndim == 4 else tensor for tensor in tensors]
    overlapping = export_cache(full, rows=2)
    for bad_layers, bad_tensors in (
        (layers[:-1], tensors),
        (layers, tensors[:-1]),
        (list(reversed(layers)), list(reversed(tensors))),
        (overlapping[0], [tensor[:, :1] if tensor.ndim == 4 else tensor for tensor in overlapping[1]]),
        (layers, [tensor[0] for tensor in wrong_heads]),
    ):
        with pytest.raises(CacheError):
            import_cache(shadow, bad_layers, bad_tensors)
    assert torch.equal(feed(model, full, [5]), feed(model, shadow, [5]))


def test_exporting_an_empty_cache_is_refused() -> None:
    model = tiny_model("mixtral")
    with pytest.raises(CacheError, match="holds nothing"):
        export_cache(plain_cache(model), rows=1)
