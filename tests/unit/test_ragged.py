"""Several sequences' tokens in one forward: the same forecasts and caches as one by one, and no room wasted."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from odmoe_model.kvcache import export_cache
from odmoe_model.store import ExpertStore
from odmoe_predictor.ragged import FREE_SLOTS, MOST_SPREAD, MOST_TOGETHER, companions
from odmoe_predictor.shadow import Shadow
from support.predictor_plain import PlainWeight, Routings
from support.stores import tiny_store
from support.tiny import FAMILIES

# Families whose caches hold something else than all keys and values, in the tests' configuration.
NOT_PLAIN = ("mixtral", "gpt_oss", "lfm2_moe")
PROMPTS = {1: [3, 17, 99, 4, 56, 23, 8], 2: [120, 77, 31], 3: [5], 4: [66, 12, 90, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9]}


@pytest.fixture(scope="module", params=FAMILIES)
def family_store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ExpertStore:
    return ExpertStore.open(tiny_store(request.param, tmp_path_factory.mktemp(request.param)), verify=False)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ExpertStore:
    return ExpertStore.open(tiny_store("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe")), verify=False)


def prompted(store: ExpertStore) -> Shadow:
    """A shadow that has computed all prompts and is about to go on by itself."""
    shadow = Shadow.load(store, quantize=PlainWeight)
    for sequence, prompt in PROMPTS.items():
        shadow.start(sequence)
        shadow.align(sequence, position=0, tokens=prompt)
        assert shadow.forecast(sequence, on_routing=lambda layer, experts: None)
        assert shadow.go_on(sequence) == "forecast"
    return shadow


def one_by_one(shadow: Shadow) -> dict[int, Routings]:
    routings: dict[int, Routings] = {sequence: {} for sequence in PROMPTS}
    for sequence in PROMPTS:
        assert shadow.forecast(sequence, on_routing=routings[sequence].__setitem__)
        assert shadow.go_on(sequence) == "forecast"
    return routings


def at_once(shadow: Shadow, *, stale: tuple[int, int] | None = None) -> tuple[dict[int, Routings], list[int]]:
    """What each is forecast, and who was finished; `stale` turns a sequence stale after a layer."""
    routings: dict[int, Routings] = {sequence: {} for sequence in PROMPTS}

    def on_routing(sequence: int, layer: int, experts: list[int]) -> None:
        routings[sequence][layer] = experts

    done = shadow.forecast_together(
        list(PROMPTS),
        on_routing=on_routing,
        is_stale=lambda sequence: stale is not None and sequence == stale[0] and stale[1] in routings[sequence],
        go_on=True,
    )
    for sequence in done:
        assert shadow.go_on(sequence) == "forecast"
    return routings, done


def test_sequences_in_one_forward_are_forecast_as_each_would_be(
    family_store: ExpertStore, request: pytest.FixtureRequest
) -> None:
    together, alone = prompted(family_store), prompted(family_store)
    if any(family in request.node.name for family in NOT_PLAIN):
        assert not together.shares(1)
        assert together.together(list(PROMPTS)) == [1]
        return
    assert all(together.shares(sequence) for sequence in PROMPTS)
    for _ in range(5):
        assert together.together(list(PROMPTS)) == list(PROMPTS)
        expected = one_by_one(alone)
        assert at_once(together) == (expected, list(PROMPTS))
        for sequence in PROMPTS:
            assert together.length(sequence) == alone.length(sequence)
            position = alone.length(sequence)
            assert together.token_at(sequence, position) == alone.token_at(sequence, position)


def test_caches_are_those_of_single_forwards(store: ExpertStore) -> None:
    together, alone = prompted(store), prompted(store)
    for _ in range(2):
        one_by_one(alone)
        at_once(together)
    for sequence in PROMPTS:
        mine, its = (export_cache(shadow._sequences[sequence].cache, rows=99)[1] for shadow in (together, alone))
        for one, other in zip(mine, its, strict=True):
            torch.testing.assert_close(one, other)


def test_who_turns_stale_amid_the_forward_is_left_as_it_was_and_the_others_finish(store: ExpertStore) -> None:
    together, alone = prompted(store), prompted(store)
    own = together.token_at(2, len(PROMPTS[2]))
    routings, done = at_once(together, stale=(2, 1))
    assert together.go_on(2) == "forecast"
    assert together.token_at(2, len(PROMPTS[2])) == own
    assert done == [1, 3, 4]
    assert sorted(routings[2]) == [0, 1], "nothing is told of it afterwards"
    assert together.length(2) == len(PROMPTS[2])
    expected = one_by_one(alone)
    again: Routings = {}
    assert together.forecast(2, on_routing=again.__setitem__)
    assert again == expected[2]
    assert {sequence: routings[sequence] for sequence in done} == {sequence: expected[sequence] for sequence in done}


def test_when_all_are_stale_the_forward_ends(store: ExpertStore) -> None:
    shadow, told = prompted(store), list[int]()
    done = shadow.forecast_together(
        list(PROMPTS),
        on_routing=lambda sequence, layer, experts: told.append(layer),
        is_stale=lambda sequence: bool(told),
    )
    assert (done, set(told)) == ([], {0})
    assert at_once(shadow)[1] == list(PROMPTS)


def test_failure_in_the_midst_leaves_all_as_they_were(store: ExpertStore) -> None:
    together, alone = prompted(store), prompted(store)

    def fail(sequence: int, layer: int, experts: list[int]) -> None:
        if (sequence, layer) == (3, 1):
            raise RuntimeError("no such luck")

    with pytest.raises(RuntimeError, match="no such luck"):
        together.forecast_together(list(PROMPTS), on_routing=fail, is_stale=lambda sequence: False)
    assert at_once(together)[0] == one_by_one(alone)


def test_only_single_tokens_behind_something_share_a_forward(store: ExpertStore) -> None:
    shadow = prompted(store)
    shadow.start(5)
    shadow.align(5, position=0, tokens=[7])
    shadow.start(6)
    shadow.align(1, position=len(PROMPTS[1]), tokens=[4, 5])
    assert shadow.together([2, 5, 1, 3, 6, 77, 4]) == [2, 3, 4]
    assert shadow.together([1, 2, 3]) == [1]
    assert shadow.together([77, 2, 3]) == [77]
    assert shadow.together([]) == []


@given(st.lists(st.integers(1, 20_000), min_size=1, max_size=40))
def test_companions_waste_no_more_room_than_allowed(lengths: list[int]) -> None:
    chosen = companions(lengths)
    inside = [lengths[place] for place in chosen]
    assert chosen[0] == 0
    assert chosen == sorted(set(chosen))
    assert len(chosen) <= MOST_TOGETHER
    assert len(inside) == 1 or len(inside) * max(inside) <= MOST_SPREAD * sum(inside) + FREE_SLOTS


def test_equals_all_go_together_and_one_that_is_far_longer_does_not() -> None:
    assert companions([1000] * 20) == list(range(MOST_TOGETHER))
    assert companions([1000, 9000, 1100, 990]) == [0, 2, 3]
    assert companions([9000, 1000, 8000]) == [0, 2]
