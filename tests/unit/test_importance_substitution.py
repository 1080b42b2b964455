"""SMoE's substitution rule against cases worked out by hand: eight experts, top-2 or top-3, S the best not chosen."""

import pytest

from odmoe_server.importance.dial import effective_alpha
from odmoe_server.importance.substitution import Choice, Swap, substitute, threshold, top_experts

# Experts 0 and 1 are chosen; S = 0.20 of expert 2. At alpha 0.3 the bar for top-score is 0.26, for substitutes 0.14.
SCORES = (0.30, 0.22, 0.20, 0.15, 0.13, 0.0, 0.0, 0.0)


def choice(*experts: int, scores: tuple[float, ...] = SCORES, alpha: float = 0.3, max_weight: float = 1.0) -> Choice:
    """As a softmax gate says it: an expert's weight is its score."""
    return Choice(experts=experts, scores=scores, weights=scores, alpha=alpha, max_weight=max_weight)


def one(chosen: Choice, at_hand: set[int]) -> tuple[Swap, ...]:
    (swaps,) = substitute([chosen], at_hand=at_hand)
    return swaps


def test_the_scores_are_cut_at_the_best_expert_that_was_not_chosen() -> None:
    assert threshold(choice(0, 1)) == 0.20
    assert top_experts(choice(0, 1)) == {0}, "0.22 is below 1.3 times 0.20"
    assert top_experts(choice(0, 1, alpha=0.09)) == {0, 1}, "0.22 is not below 1.09 times 0.20"
    assert top_experts(choice(0, 1, alpha=0.6)) == set()


def test_a_low_score_expert_that_is_missing_is_replaced_by_the_next_best_one_itself() -> None:
    """The (k+1)-th expert is a candidate, which the authors' code forgets."""
    assert one(choice(0, 1), {2, 3}) == (Swap(1, 1, 2),)


def test_the_best_scored_substitute_at_hand_goes_first_and_of_equals_the_lower_index() -> None:
    assert one(choice(0, 1), {3, 4, 7}) == (Swap(1, 1, 3),), "4 has 0.13, below 0.7 times 0.20"
    tied = (0.30, 0.22, 0.15, 0.20, 0.18, 0.18, 0.0, 0.0)
    assert one(choice(0, 1, scores=tied), {5, 4}) == (Swap(1, 1, 4),)


def test_what_lies_in_a_slot_and_what_is_top_score_is_not_replaced() -> None:
    assert one(choice(0, 1), {1, 2}) == ()
    assert one(choice(0, 1), {2}) == (Swap(1, 1, 2),), "0 is missing too, but it is top-score"


def test_without_a_candidate_the_gate_has_its_way() -> None:
    assert one(choice(0, 1), set()) == ()
    assert one(choice(0, 1), {4, 5, 6, 7}) == (), "all of them score too little"
    assert one(choice(0, 1, alpha=0.25), {3}) == (), "0.15 is not above 0.75 times 0.20, its equal"


def test_alpha_0_replaces_nothing_even_where_scores_are_equal() -> None:
    assert one(choice(0, 1, alpha=0.0), set(range(2, 8))) == ()
    equal = (0.2,) * 5 + (0.0,) * 3
    assert top_experts(choice(0, 1, scores=equal, alpha=0.0)) == {0, 1}
    assert one(choice(0, 1, scores=equal, alpha=0.0), {2, 3}) == ()


def test_equal_scores_are_low_score_as_soon_as_alpha_is_above_0() -> None:
    """The paper's sets leave out an expert exactly at S; it is the least worth loading of all."""
    equal = (0.2,) * 5 + (0.0,) * 3
    assert one(choice(0, 1, scores=equal, alpha=0.1), {2, 3}) == (Swap(0, 0, 2), Swap(1, 1, 3))


def test_with_fewer_substitutes_than_missing_experts_the_lowest_scored_give_way() -> None:
    scores = (0.21, 0.24, 0.22, 0.20, 0.10, 0.0, 0.0, 0.0)
    assert one(choice(1, 2, 0, scores=scores, alpha=0.4), {3}) == (Swap(2, 0, 3),)
    assert one(choice(1, 2, 0, scores=scores, alpha=0.4), {3, 4, 2}) == (Swap(2, 0, 3),), "0.10 is below 0.6 times 0.20"


def test_another_tokens_top_score_expert_is_at_hand() -> None:
    other = choice(3, 4, scores=(0.0, 0.0, 0.0, 0.5, 0.4, 0.1, 0.0, 0.0))
    assert substitute([choice(0, 1), other], at_hand=()) == [(Swap(1, 1, 3),), ()], "as a substitute"
    keeps = choice(1, 4, scores=(0.0, 0.5, 0.0, 0.1, 0.4, 0.1, 0.0, 0.0))
    assert substitute([choice(0, 1), keeps], at_hand={2}) == [(), ()], "or as what was chosen"


def test_a_token_cannot_lean_on_its_own_experts_or_on_anothers_low_score_ones() -> None:
    assert substitute([choice(0, 1), choice(0, 1)], at_hand=()) == [(), ()]
    low = choice(0, 3, scores=(0.50, 0.10, 0.20, 0.21, 0.0, 0.0, 0.0, 0.0))
    assert top_experts(low) == {0}
    assert substitute([choice(0, 1), low], at_hand=()) == [(), ()], "3 itself may be replaced, so it is not certain"


def test_experts_the_gate_may_not_choose_are_no_substitutes() -> None:
    closed = float("-inf")
    scores = (0.30, 0.22, closed, 0.20, closed, closed, closed, closed)
    assert one(choice(0, 1, scores=scores), {2, 4, 5}) == ()
    assert threshold(choice(0, 1, scores=scores)) == 0.20


@pytest.mark.parametrize("scores", [(0.3, 0.2) + (-0.1,) * 6, (0.3, 0.2) + (float("-inf"),) * 6])
def test_where_no_other_expert_scores_above_nothing_all_chosen_are_top_score(scores: tuple[float, ...]) -> None:
    assert top_experts(choice(0, 1, scores=scores, alpha=1.0)) == {0, 1}
    assert one(choice(0, 1, scores=scores, alpha=1.0), set(range(2, 8))) == ()


def test_the_weight_that_is_replaced_has_a_bound() -> None:
    """Of 0.21 + 0.24 + 0.22 = 0.67 the lowest is 0.21, so 31.3 % are replaced with one swap and 64.2 % with two."""
    scores = (0.21, 0.24, 0.22, 0.20, 0.19, 0.18, 0.0, 0.0)
    at_hand = {3, 4, 5}
    swaps = (Swap(2, 0, 3), Swap(1, 2, 4), Swap(0, 1, 5))
    for max_weight, most in ((0.31, 0), (0.32, 1), (0.64, 1), (0.65, 2), (0.99, 2), (1.0, 3)):
        limited = choice(1, 2, 0, scores=scores, alpha=0.5, max_weight=max_weight)
        assert one(limited, at_hand) == swaps[:most], max_weight


def test_a_likeness_chooses_among_the_candidates_and_makes_none() -> None:
    def likeness(old: int, new: int) -> float:
        return {2: 0.1, 3: 0.9, 4: 1.0}[new]

    (swaps,) = substitute([choice(0, 1)], at_hand={2, 3, 4}, likeness=likeness)
    assert swaps == (Swap(1, 1, 3),), "4 is liker, but scores too little"


def test_a_request_gets_what_it_asks_for_up_to_the_cap() -> None:
    assert effective_alpha(None, default=0.3, cap=0.5) == 0.3
    assert effective_alpha(0.4, default=0.3, cap=0.5) == 0.4
    assert effective_alpha(0.9, default=0.3, cap=0.5) == 0.5
    assert effective_alpha(0.0, default=0.3, cap=0.5) == 0.0
    assert effective_alpha(None, default=0.3, cap=0.0) == 0.0
    with pytest.raises(ValueError, match="between 0 and 1"):
        effective_alpha(-0.1, default=0.3, cap=0.5)
