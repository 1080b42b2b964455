"""Who takes the next step: turns, chunks and guesses, case by case."""

from dataclasses import dataclass, field

import pytest

from odmoe_server.engine.rota import CHUNKS_TOGETHER, MOST_HELD_UP, MOST_LANES, Patience, Rota


@dataclass
class Runner:
    name: str
    is_prompt: bool = False
    fresh_ids: list[int] = field(default_factory=lambda: [1])


def prompt(name: str, tokens: int) -> Runner:
    return Runner(name, is_prompt=True, fresh_ids=[1] * tokens)


def names(batch: list[Runner]) -> str:
    return "".join(runner.name for runner in batch)


def test_nobody_runs() -> None:
    assert Rota(chunk=8).next_batch([]) == []


def test_prompts_and_answers_take_turns_while_there_are_both() -> None:
    rota, runners = Rota(chunk=8), [Runner("a"), prompt("P", 8), Runner("b")]
    assert [names(rota.next_batch(runners)) for _ in range(4)] == ["P", "ab", "P", "ab"]
    assert [names(rota.next_batch([runners[0]])) for _ in range(2)] == ["a", "a"]


def test_only_prompts_do_not_wait_for_answers() -> None:
    rota = Rota(chunk=8)
    assert [names(rota.next_batch([prompt("P", 8)])) for _ in range(3)] == ["P"] * 3


@pytest.mark.parametrize(
    ("tokens", "expected"), [((3, 5), "PQ"), ((3, 6), "P"), ((9, 1), "P"), ((4, 5, 4), "PR"), ((2, 2, 2, 2, 1), "PQRS")]
)
def test_prompts_share_a_step_whole_in_the_order_they_came(tokens: tuple[int, ...], expected: str) -> None:
    runners = [prompt(name, count) for name, count in zip("PQRST", tokens, strict=False)]
    assert names(Rota(chunk=8 // CHUNKS_TOGETHER).next_batch(runners)) == expected


def test_prompts_that_need_one_piece_go_one_by_one() -> None:
    assert names(Rota(chunk=None).next_batch([prompt("P", 3), prompt("Q", 3)])) == "P"


@pytest.mark.parametrize(("answers", "expected"), [(1, 7), (2, 7), (4, 3), (8, 1), (16, 0), (40, 0), (0, 7)])
def test_the_more_answers_the_fewer_guesses_each(answers: int, expected: int) -> None:
    assert Rota(chunk=8, draft=7).num_drafts(answers) == expected
    assert answers * (1 + expected) <= max(MOST_LANES, answers)


def test_nobody_is_impatient_before_there_was_an_answer() -> None:
    assert not Patience().is_over(1e9, num_layers=1)


def test_a_part_of_a_prompt_ends_before_the_layer_that_would_hold_up_answers_for_too_long() -> None:
    patience = Patience()
    patience.answered(2.0)
    most_s = 2.0 * MOST_HELD_UP
    assert not patience.is_over(0.5 * most_s, num_layers=1)  # two such layers just fit
    assert patience.is_over(0.51 * most_s, num_layers=1)
    assert not patience.is_over(0.75 * most_s, num_layers=3)
    assert patience.is_over(0.76 * most_s, num_layers=3)


def test_patience_follows_what_steps_take_and_no_single_one() -> None:
    patience = Patience()
    patience.answered(1.0)
    patience.answered(9.0)  # one slow step
    assert patience.is_over(2.5 * MOST_HELD_UP, num_layers=1)
    for _ in range(40):
        patience.answered(9.0)
    assert not patience.is_over(4.4 * MOST_HELD_UP, num_layers=1)
