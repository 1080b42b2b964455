"""The short cuts of the SMoE authors' code beside the paper's rule, on the same cases worked out by hand."""

from odmoe_server.bench.importance.arms import GOAL_ALPHA, arms
from odmoe_server.bench.importance.shortcuts import substitute_as_coded
from odmoe_server.importance.substitution import Choice, Swap, substitute

# Experts 0 and 1 are chosen, S = 0.20 of expert 4; at alpha 0.3 substitutes score above 0.14, and 1 is low-score.
SCORES = (0.30, 0.22, 0.15, 0.18, 0.20, 0.0)


def choice(*experts: int, alpha: float = 0.3) -> Choice:
    return Choice(experts=experts, scores=SCORES, weights=SCORES, alpha=alpha)


def test_the_next_best_expert_itself_never_stands_in() -> None:
    assert substitute([choice(0, 1)], at_hand={4}) == [(Swap(1, 1, 4),)]
    assert substitute_as_coded([choice(0, 1)], at_hand={4}) == [()]


def test_the_first_by_index_is_taken_not_the_best_scored() -> None:
    assert substitute([choice(0, 1)], at_hand={2, 3}) == [(Swap(1, 1, 3),)]
    assert substitute_as_coded([choice(0, 1)], at_hand={3, 2}) == [(Swap(1, 1, 2),)]


def test_in_all_else_it_is_the_papers() -> None:
    assert substitute_as_coded([choice(0, 1)], at_hand={1, 2}) == [()], "what is at hand is not replaced"
    assert substitute_as_coded([choice(0, 1)], at_hand={5}) == [()], "0.0 is too little"
    assert substitute_as_coded([choice(0, 1, alpha=0.0)], at_hand={2, 3}) == [()]
    other = Choice(experts=(3,), scores=(0.0,) * 3 + (0.9, 0.1, 0.0), weights=SCORES, alpha=0.3)
    assert substitute_as_coded([choice(0, 1), other], at_hand=()) == [(Swap(1, 1, 3),), ()], "another's top-score one"


def test_every_short_cut_has_a_line_beside_the_papers_rule() -> None:
    found = {arm.policy: arm for arm in arms(batches=(1,), quick=True, like=None) if arm.alpha == GOAL_ALPHA}
    assert {policy for policy, arm in found.items() if arm.as_coded} == {"code-substitution", "code"}
    assert found["prefetch-top"].features.only_top
    assert not found["prefetch"].features.only_top
    assert found["code"].features.eviction == found["code-eviction"].features.eviction == "lru"
    assert found["code"].features.fetches_one
    assert found["code-prefetch"].features.fetches_one
