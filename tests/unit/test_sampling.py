"""From logits to tokens: each knob of sampling alone, together, and what a seed promises."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from odmoe_server.engine.sampling import Sampler
from odmoe_server.engine_api import Sampling, Token

PROMPT = (0, 1, 1)
LOGITS_V = torch.tensor([0.0, 1.0, 2.0, 3.0, 2.5])


def answer(sampling: Sampling, *, tokens: int, end_ids: frozenset[int] = frozenset()) -> list[Token]:
    """So many tokens of a model that gives the same logits always."""
    sampler, ids, found = Sampler(sampling, end_ids=end_ids), list(PROMPT), []
    for _ in range(tokens):
        found.append(sampler.next_token(LOGITS_V, ids))
        ids.append(found[-1].token_id)
    return found


def chosen(sampling: Sampling, *, tokens: int = 1, end_ids: frozenset[int] = frozenset()) -> list[int]:
    return [token.token_id for token in answer(sampling, tokens=tokens, end_ids=end_ids)]


@pytest.mark.parametrize("temperature", [0.0, 1e-6])
def test_no_temperature_is_greedy(temperature: float) -> None:
    assert chosen(Sampling(temperature=temperature), tokens=3) == [3, 3, 3]


@pytest.mark.parametrize(
    "knobs", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-3}, {"logit_bias": ((3, 100.0),)}]
)
def test_each_way_to_leave_only_the_likeliest(knobs: dict[str, object]) -> None:
    assert set(chosen(Sampling(**knobs), tokens=40)) == {3}  # type: ignore[arg-type]
    assert len(set(chosen(Sampling(), tokens=40))) > 1


@pytest.mark.parametrize(
    ("knobs", "left"), [({"top_k": 2}, {3, 4}), ({"top_p": 0.6}, {3, 4}), ({"min_p": 0.3}, {2, 3, 4})]
)
def test_what_is_cut_off(knobs: dict[str, object], left: set[int]) -> None:
    assert set(chosen(Sampling(**knobs, seed=1), tokens=200)) == left  # type: ignore[arg-type]


def test_a_bias_moves_the_greedy_choice() -> None:
    assert chosen(Sampling(temperature=0, logit_bias=((3, -100.0), (0, 1.5)))) == [4]


def test_a_presence_penalty_is_taken_once() -> None:
    # 3.0 and 2.5 and 2.0: each is taken once; then all that were seen are 1.9 lower, and stay so.
    assert chosen(Sampling(temperature=0, presence_penalty=1.9), tokens=5) == [3, 4, 2, 3, 3]


def test_a_frequency_penalty_grows() -> None:
    assert chosen(Sampling(temperature=0, frequency_penalty=0.4), tokens=5) == [3, 3, 4, 3, 4]


def test_presence_and_frequency_do_not_count_the_prompt() -> None:
    logits_V = torch.tensor([0.0, 3.0, 2.9])
    sampling = Sampling(temperature=0, presence_penalty=2.0, frequency_penalty=2.0)
    assert Sampler(sampling).next_token(logits_V, [1, 1, 1]).token_id == 1


def test_the_repetition_penalty_counts_the_prompt() -> None:
    logits_V = torch.tensor([0.0, 3.0, 2.9])
    assert Sampler(Sampling(temperature=0, repetition_penalty=1.5)).next_token(logits_V, [1]).token_id == 2


def test_no_end_before_min_tokens() -> None:
    sampling = Sampling(temperature=0, min_tokens=2)
    assert chosen(sampling, tokens=4, end_ids=frozenset({3, 4})) == [2, 2, 3, 3]


def test_a_seed_gives_the_same_answer_whatever_runs_beside() -> None:
    alone = chosen(Sampling(seed=7), tokens=50)
    ours, other, ids = Sampler(Sampling(seed=7)), Sampler(Sampling(seed=8)), list(PROMPT)
    for _ in range(50):
        other.next_token(LOGITS_V, ids)
        ids.append(ours.next_token(LOGITS_V, ids).token_id)
    assert ids[len(PROMPT) :] == alone
    assert chosen(Sampling(seed=8), tokens=50) != alone
    assert chosen(Sampling(), tokens=50) != chosen(Sampling(), tokens=50)


@pytest.mark.parametrize("seed", [-(2**63), 2**63 - 1, 0])
def test_any_int64_is_a_seed(seed: int) -> None:
    assert chosen(Sampling(seed=seed), tokens=5) == chosen(Sampling(seed=seed), tokens=5)


def test_no_log_probabilities_unless_asked() -> None:
    assert answer(Sampling(), tokens=1)[0].logprob is None


@pytest.mark.parametrize("knobs", [{"temperature": 0.0}, {"temperature": 0.2, "top_k": 1, "logit_bias": ((0, 5.0),)}])
def test_log_probabilities_are_the_models_own(knobs: dict[str, object]) -> None:
    (token,) = answer(Sampling(**knobs, top_logprobs=2), tokens=1)  # type: ignore[arg-type]
    logprobs_V = LOGITS_V.log_softmax(dim=-1)
    assert token.logprob == pytest.approx(float(logprobs_V[token.token_id]))
    assert [token_id for token_id, _ in token.top] == [3, 4]
    assert token.top[1][1] == pytest.approx(float(logprobs_V[4]))


@pytest.mark.parametrize(("wanted", "given"), [(0, 0), (5, 5), (20, 5)])
def test_as_many_of_the_likeliest_as_asked(wanted: int, given: int) -> None:
    (token,) = answer(Sampling(temperature=0, top_logprobs=wanted), tokens=1)
    assert len(token.top) == given
    assert token.logprob is not None


class Alternating:
    """Allows 0 and 1 in turn, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def start(self) -> Callable[[Sequence[int], Tensor], Tensor]:
        def allow(ids: Sequence[int], scores_V: Tensor) -> Tensor:
            self.asked.append(list(ids))
            mask_V = torch.full_like(scores_V, -math.inf)
            mask_V[len(ids) % 2] = 0
            return scores_V + mask_V

        return allow


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_constraint_sees_the_answer_only_and_decides(temperature: float) -> None:
    constraint = Alternating()
    assert chosen(Sampling(temperature=temperature, constraint=constraint), tokens=3) == [0, 1, 0]
    assert constraint.asked == [[], [0], [0, 1]]
