"""Eviction, prefetch and the host's share of importance mode against cases worked out by hand."""

import pytest

from odmoe_server.importance.cpu_share import Costs, Split, split
from odmoe_server.importance.eviction import victims
from odmoe_server.importance.history import History, Key
from odmoe_server.importance.prefetch import to_fetch
from odmoe_server.importance.substitution import Choice

A, B, C, D = (Key(0, expert) for expert in range(4))


def history(*steps: list[float], window: int = 3, num_layers: int = 2) -> History:
    """Of one token a step, seen by layer 0."""
    told = History(num_layers=num_layers, num_experts=4, window=window)
    for scores in steps:
        told.scored(0, [scores])
    return told


# ---------------------------------------------------------------------------------------------- scores of the past


def test_every_experts_score_counts_in_the_mean_of_the_last_steps() -> None:
    told = history([1.0, 0.0, 0.0, 0.0], [0.4, 0.3, 0.2, 0.1], [0.2, 0.5, 0.2, 0.1], [0.0, 0.1, 0.2, 0.7])
    means = [told.mean_score(key) for key in (A, B, C, D)]
    assert means == pytest.approx([0.2, 0.3, 0.2, 0.3]), "the first step is out of the window"
    assert told.mean_score(Key(1, 0)) == 0.0, "layer 1 has seen no step"


def test_a_step_of_several_tokens_is_one_step_of_their_mean() -> None:
    told = History(num_layers=1, num_experts=2, window=2)
    told.scored(0, [[0.8, 0.2], [0.2, 0.8], [0.2, 0.8]])
    told.scored(0, [[0.6, 0.4]])
    assert told.mean_score(Key(0, 0)) == pytest.approx((0.4 + 0.6) / 2)


def test_a_window_of_no_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one step"):
        History(num_layers=1, num_experts=1, window=0)


# ------------------------------------------------------------------------------------------------------- eviction


def test_the_lowest_mean_score_leaves_first_used_or_not() -> None:
    told = history([0.1, 0.2, 0.3, 0.4], [0.4, 0.2, 0.3, 0.1])
    told.used(0, [1])
    assert victims([A, B, C, D], policy="score", history=told) == [B, A, D, C], "A and D tie: the index decides"


def test_of_equal_scores_the_one_used_longest_ago_leaves_first() -> None:
    told = history([0.25] * 4)
    told.used(0, [0, 1, 2])
    told.used(0, [0])
    assert victims([A, B, C, D], policy="score", history=told) == [D, B, C, A]


def test_the_least_recently_and_the_least_often_used() -> None:
    told = history([0.1, 0.2, 0.3, 0.4])
    for used in ([0], [0], [1], [2], [1]):
        told.used(0, used)
    assert victims([A, B, C, D], policy="lru", history=told) == [D, A, C, B]
    assert victims([A, B, C, D], policy="lfu", history=told) == [D, C, A, B], "A and B twice, A longer ago"


def test_what_is_forecast_leaves_last_and_of_that_what_is_needed_latest() -> None:
    told = history([0.1, 0.2, 0.3, 0.4])
    foreseen = {A: 1, C: 5}
    assert victims([A, B, C, D], policy="forecast", history=told, foreseen=foreseen) == [B, D, C, A]


@pytest.mark.parametrize("policy", ["score", "lru", "lfu", "forecast"])
def test_protected_experts_never_leave(policy: str) -> None:
    told = history([0.1, 0.2, 0.3, 0.4])
    order = victims([A, B, C, D], policy=policy, history=told, protected={A, C})  # type: ignore[arg-type]
    assert order == [B, D]


def test_layers_share_one_cache() -> None:
    told = history([0.1, 0.2, 0.3, 0.4])
    told.scored(1, [[0.15, 0.0, 0.0, 0.0]])
    assert victims([A, B, Key(1, 0)], policy="score", history=told) == [A, Key(1, 0), B]


# ------------------------------------------------------------------------------------------------------- prefetch


def test_missing_top_score_experts_are_fetched_the_best_first() -> None:
    """S is 0.20: at alpha 0.3 what is below 0.26 can be replaced by what scores above 0.14, and is left to that."""
    scores = (0.27, 0.30, 0.22, 0.20, 0.01)
    predicted = Choice(experts=(0, 1, 2), scores=scores, weights=scores, alpha=0.3)
    assert to_fetch([predicted], at_hand={3}) == [1, 0]
    assert to_fetch([predicted], at_hand={1, 2}) == [0]
    exact = Choice(experts=(2,), scores=scores, weights=scores, alpha=0.0)
    assert to_fetch([predicted, exact], at_hand=()) == [1, 0, 2], "the other token needs all of its own"


def test_what_nothing_at_hand_could_stand_in_for_is_fetched_last() -> None:
    """Else it would be loaded when its layer comes. The paper leaves it to that."""
    scores = (0.27, 0.30, 0.22, 0.20, 0.01)
    predicted = Choice(experts=(0, 1, 2), scores=scores, weights=scores, alpha=0.3)
    assert to_fetch([predicted], at_hand=()) == [1, 0, 2]
    assert to_fetch([predicted], at_hand={4}) == [1, 0, 2], "0.01 is below 0.7 times 0.20"
    assert to_fetch([predicted], at_hand=(), only_top=True) == [1, 0]
    low = Choice(experts=(2, 0), scores=(0.25, 0.0, 0.26, 0.20), weights=(1.0,) * 4, alpha=0.4)
    top = Choice(experts=(1,), scores=(0.01, 0.2, 0.0, 0.1), weights=(1.0,) * 4, alpha=0.4)
    assert to_fetch([low, top], at_hand=()) == [1, 2, 0], "another token's top-score expert before a better low one"
    held = to_fetch([low, top], at_hand={3})
    assert held == [1, 2], "the lowest is replaced, and one can stand in for one only"


# ---------------------------------------------------------------------------------------------------- host's share

MISSING = {4: 0.1, 7: 0.4, 1: 0.3, 2: 0.2, 9: 0.25}
ONE_LINK = dict.fromkeys(MISSING, "n0")


def test_the_best_are_loaded_and_the_least_computed_until_they_meet() -> None:
    """One link, a load of 2 against 3 on the host. 0,0: load 7; 2,0: host 4; 2,3: load 1; 4,3: host 2; 4,6: load 9."""
    assert split(MISSING, links=ONE_LINK, load_s=2.0, host_s=3.0) == Split(load=(7, 1, 9), host=(4, 2))


def test_a_slow_host_does_no_more_than_it_can_beside_the_loads() -> None:
    assert split(MISSING, links=ONE_LINK, load_s=1.0, host_s=50.0) == Split(load=(7, 1, 9, 2), host=(4,))
    assert split({3: 0.5}, links={3: "n0"}, load_s=1.0, host_s=0.1) == Split(load=(3,), host=())


def test_a_fast_host_takes_all_but_the_best() -> None:
    assert split(MISSING, links=ONE_LINK, load_s=5.0, host_s=1.0) == Split(load=(7,), host=(4, 2, 9, 1))


def test_links_run_side_by_side() -> None:
    """Three nodes, each with its own link, are busy no longer with three loads than with one: 2,0: host 4; 2,3: load 1
    (2,3 still); load 9 (still); load 2, the first on a link that is taken."""
    links = {7: "n0", 1: "n1", 9: "n2", 2: "n0", 4: "n1"}
    assert split(MISSING, links=links, load_s=2.0, host_s=3.0) == Split(load=(7, 1, 9, 2), host=(4,))


def test_equal_scores_are_shared_out_by_index() -> None:
    assert split({5: 0.2, 3: 0.2, 8: 0.2}, links=dict.fromkeys((3, 5, 8), "n0"), load_s=1, host_s=1) == Split(
        load=(3, 5), host=(8,)
    )


def test_costs_are_means_of_the_last_ones_and_unknown_before() -> None:
    costs = Costs(window=2)
    assert (costs.load_s, costs.host_s) == (None, None)
    for seconds in (1.0, 2.0, 4.0):
        costs.loaded(seconds)
    costs.computed(0.5)
    assert (costs.load_s, costs.host_s) == (3.0, 0.5)
