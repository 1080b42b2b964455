"""When the shadow is aligned and with what: periods, beginnings, predictors that come and go. Pure."""

import pytest

from odmoe_server.engine.align import Alignment, Periods, Shadowed

PROMPT = 10


def steps(periods: Periods, num_steps: int) -> list[Alignment | None]:
    """What decode steps of one token each send, after a prompt."""
    shadowed = Shadowed()
    return [shadowed.align(predictor=1, position=PROMPT + i, num_fresh=1, periods=periods) for i in range(num_steps)]


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
    shadowed.align(predictor=1, position=PROMPT, num_fresh=1, periods=periods)
    again = shadowed.align(predictor=2, position=PROMPT + 1, num_fresh=1, periods=periods)
    assert again == Alignment(start=True, token=True, rows=PROMPT + 1)


def test_no_predictor_and_a_prompt_send_nothing_and_count_for_nothing() -> None:
    shadowed, periods = Shadowed(), Periods(token=2)
    assert shadowed.align(predictor=1, position=0, num_fresh=PROMPT, periods=periods) is None
    assert shadowed.align(predictor=None, position=PROMPT, num_fresh=1, periods=periods) is None
    first = shadowed.align(predictor=1, position=PROMPT + 1, num_fresh=1, periods=periods)
    assert first == Alignment(start=True, token=True, rows=PROMPT + 1)


def test_a_step_of_several_tokens_always_brings_them() -> None:
    shadowed, periods = Shadowed(), Periods(token=None)
    shadowed.align(predictor=1, position=PROMPT, num_fresh=1, periods=periods)
    several = shadowed.align(predictor=1, position=PROMPT + 1, num_fresh=3, periods=periods)
    assert several == Alignment(start=False, token=True, rows=1)
