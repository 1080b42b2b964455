"""When the shadow is aligned and with what: periods, beginnings, predictors that come and go. Pure."""

from dataclasses import replace

import pytest

from odmoe_server.engine.align import Alignment, Periods, Shadowed
from odmoe_wire.messages import Wants

PROMPT = 10


def steps(periods: Periods, num_steps: int) -> list[Alignment | None]:
    """What decode steps of one token each send, after a prompt."""
    shadowed = Shadowed()
    return [
        shadowed.align(predictor=1, position=PROMPT + i, num_fresh=1, num_prompt=PROMPT, periods=periods)
        for i in range(num_steps)
    ]


def test_every_step_brings_the_token_and_the_position_before_it() -> None:
    first, *others = steps(Periods(), 4)
    assert first == Alignment(start=True, token=True, rows=PROMPT)
    assert others == [Alignment(start=False, token=True, rows=1)] * 3


@pytest.mark.parametrize(
    ("token", "kv", "tokens", "rows"),
    [
        (2, 1, "TfTfTfTfT", [PROMPT, 1, 1, 1, 1, 1, 1, 1, 1]),
        (1, 4, "TTTTTTTTT", [PROMPT, 0, 0, 0, 4, 0, 0, 0, 4]),
        (4, 2, "TfffTfffT", [PROMPT, 0, 2, 0, 2, 0, 2, 0, 2]),
        (None, 8, "Tffffffff", [PROMPT, 0, 0, 0, 0, 0, 0, 0, 8]),
        (1, None, "TTTTTTTTT", [PROMPT, 0, 0, 0, 0, 0, 0, 0, 0]),
    ],
)
def test_periods(token: int | None, kv: int | None, tokens: str, rows: list[int]) -> None:
    sent = steps(Periods(token=token, kv=kv), 9)
    assert all(sent), "in every step the shadow hears how far we are"
    assert "".join("T" if one and one.token else "f" for one in sent) == tokens
    assert [one and one.rows for one in sent] == rows


def test_another_predictor_gets_everything_whatever_the_periods() -> None:
    shadowed, periods = Shadowed(), Periods(token=None, kv=None)
    shadowed.align(predictor=1, position=PROMPT, num_fresh=1, num_prompt=PROMPT, periods=periods)
    again = shadowed.align(predictor=2, position=PROMPT + 1, num_fresh=1, num_prompt=PROMPT, periods=periods)
    assert again == Alignment(start=True, token=True, rows=PROMPT + 1)


def test_no_predictor_and_a_prompt_send_nothing_and_count_for_nothing() -> None:
    shadowed, periods = Shadowed(), Periods(token=2)
    assert shadowed.align(predictor=1, position=0, num_fresh=PROMPT, num_prompt=PROMPT, periods=periods) is None
    assert shadowed.align(predictor=None, position=PROMPT, num_fresh=1, num_prompt=PROMPT, periods=periods) is None
    first = shadowed.align(predictor=1, position=PROMPT + 1, num_fresh=1, num_prompt=PROMPT, periods=periods)
    assert first == Alignment(start=True, token=True, rows=PROMPT + 1)


def chunks(shadowed: Shadowed, periods: Periods, *, wants: Wants = "cache") -> list[Alignment | None]:
    """What a prompt sends that goes through the model in two steps."""
    half = PROMPT // 2
    return [
        shadowed.align(predictor=1, wants=wants, position=position, num_fresh=half, num_prompt=PROMPT, periods=periods)
        for position in (0, half)
    ]


def test_a_chunk_of_a_prompt_is_a_prompt_and_the_shadow_gets_the_whole_once() -> None:
    shadowed, periods = Shadowed(), Periods()
    assert chunks(shadowed, periods) == [None, None]
    first = shadowed.align(predictor=1, position=PROMPT, num_fresh=1, num_prompt=PROMPT, periods=periods)
    assert first == Alignment(start=True, token=True, rows=PROMPT)


def test_a_shadow_that_computes_the_prompt_itself_is_told_when_it_begins() -> None:
    shadowed, periods = Shadowed(), Periods(prompt="own", kv=2)
    assert chunks(shadowed, periods) == [Alignment(start=True, token=True, rows=0), None]
    after = [
        shadowed.align(predictor=1, position=PROMPT + i, num_fresh=1, num_prompt=PROMPT, periods=periods)
        for i in range(4)
    ]
    assert [one and (one.start, one.token, one.rows) for one in after] == [
        (False, True, 0),
        (False, True, 0),
        (False, True, 2),
        (False, True, 0),
    ]


def test_a_predictor_that_missed_the_prompt_gets_it_from_us() -> None:
    shadowed, periods = Shadowed(), Periods(prompt="own")
    chunks(shadowed, periods)
    first = shadowed.align(predictor=2, position=PROMPT, num_fresh=1, num_prompt=PROMPT, periods=periods)
    assert first == Alignment(start=True, token=True, rows=PROMPT)


def test_a_predictor_without_a_shadow_is_not_told_of_the_prompt() -> None:
    assert chunks(Shadowed(), Periods(prompt="own"), wants="routings") == [None, None]


def test_a_step_of_several_tokens_always_brings_them() -> None:
    shadowed, periods = Shadowed(), Periods(token=None)
    shadowed.align(predictor=1, position=PROMPT, num_fresh=1, num_prompt=PROMPT, periods=periods)
    several = shadowed.align(predictor=1, position=PROMPT + 1, num_fresh=3, num_prompt=PROMPT, periods=periods)
    assert several == Alignment(start=False, token=True, rows=1)


def test_a_shadow_that_wants_inputs_too_gets_them_in_decode_steps_with_all_else() -> None:
    def sent(wants: Wants) -> list[Alignment | None]:
        shadowed, periods = Shadowed(), Periods(token=2, kv=2, prompt="own")
        steps = [(0, PROMPT), *((PROMPT + i, 1) for i in range(3))]
        return [
            shadowed.align(
                predictor=1, wants=wants, position=position, num_fresh=num, num_prompt=PROMPT, periods=periods
            )
            for position, num in steps
        ]

    prompt, *steps = sent("cache")
    assert sent("cache+inputs") == [prompt, *(step and replace(step, wants="cache+inputs") for step in steps)]


@pytest.mark.parametrize("wants", ["routings", "inputs"])
def test_a_predictor_that_is_no_shadow_gets_every_token_and_no_cache(wants: Wants) -> None:
    shadowed, periods = Shadowed(), Periods(token=None, kv=1, prompt="own")

    def align(position: int, *, predictor: int) -> Alignment | None:
        return shadowed.align(
            predictor=predictor, wants=wants, position=position, num_fresh=1, num_prompt=PROMPT, periods=periods
        )

    assert align(0, predictor=1) is None, "prompts are not told"
    assert align(PROMPT - 1, predictor=1) is None
    assert align(PROMPT, predictor=1) == Alignment(start=True, token=True, rows=0, wants=wants)
    assert align(PROMPT + 1, predictor=1) == Alignment(start=False, token=True, rows=0, wants=wants)
    assert align(PROMPT + 2, predictor=2) == Alignment(start=True, token=True, rows=0, wants=wants)


def test_a_shadow_in_place_of_another_predictor_gets_everything() -> None:
    shadowed = Shadowed()
    for wants, incarnation in (("routings", 1), ("cache", 2)):
        due = shadowed.align(
            predictor=incarnation,
            wants=wants,
            position=PROMPT + incarnation,
            num_fresh=1,
            num_prompt=PROMPT,
            periods=Periods(),
        )
    assert due == Alignment(start=True, token=True, rows=PROMPT + 2)
