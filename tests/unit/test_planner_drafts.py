"""The planner's steps of several tokens, against times that can be worked out by hand."""

from dataclasses import replace

import pytest

from odmoe_server.planner import drafts
from odmoe_server.planner.command import question_of
from odmoe_server.planner.drafts import EXTRA_ROW, Ahead
from odmoe_server.planner.forecasts import Forecast
from odmoe_server.planner.machines import Crew, Node, Times
from odmoe_server.planner.question import PlanSettings
from odmoe_server.planner.simulate import Decoded
from odmoe_wire import settings

LAYERS, EXPERTS, TOP_K = 4, 8, 2
FORECAST = Forecast(run_ahead=8, draft=3)


def crew(nodes: int = 8) -> Crew:
    return Crew(nodes=(Node(slots=1, link_gb_per_s=1.0),) * nodes, group_size=nodes, shared_core=True)


def steps(*, load_s: float = 0.0, shadow_s: float = 0.0, nodes: int = 8) -> Times:
    return Times(
        main_s=1.0, expert_s=2.0, shadow_s=shadow_s, load_s=(load_s,) * nodes, row_s=0.0, kv_s=0.0, latency_s=0.0
    )


def decode(forecast: Forecast, times: Times, *, tokens: int = 41, experts: int = EXPERTS, nodes: int = 8) -> Decoded:
    return drafts.decode(
        crew(nodes), times, forecast, layers=LAYERS, num_experts=experts, top_k=TOP_K, tokens=tokens, seed=1
    )


def test_tokens_that_share_all_their_experts_cost_only_their_further_rows() -> None:
    """Two experts, so that all tokens need both: no loads, a shadow that takes next to no time and is always right."""
    found = decode(FORECAST, steps(shadow_s=0.01), experts=TOP_K)
    step_s = LAYERS * (4 * 1.0 + TOP_K * 2.0 * (1 + 3 * EXTRA_ROW))
    first_s = LAYERS * (1.0 + TOP_K * 2.0)
    assert found.ends_s[0] == pytest.approx(first_s), "no guess is known when the first token begins"
    assert found.ends_s[1] == pytest.approx(2 * first_s), "nor when nobody knows yet how long a step takes"
    assert found.ends_s[-1] - found.ends_s[-5] == pytest.approx(step_s)
    assert len(found.ends_s) == 41


def test_guesses_that_are_always_wrong_are_paid_for_and_bring_nothing() -> None:
    wrong = decode(replace(FORECAST, agreement=0.0), steps(), experts=TOP_K)
    one_s = LAYERS * (1.0 + TOP_K * 2.0)
    assert len(set(wrong.ends_s)) == 41, "each step brings one token"
    assert wrong.ends_s[-1] > 41 * one_s
    assert decode(replace(FORECAST, agreement=0.5), steps(), experts=TOP_K).ends_s[-1] < wrong.ends_s[-1]


def test_without_guesses_it_is_the_simulation_of_single_tokens() -> None:
    single = decode(Forecast(run_ahead=1), steps(load_s=3.0))
    assert single.ends_s[0] < single.ends_s[1] < single.ends_s[2]
    assert decode(replace(FORECAST, draft=1), steps(load_s=3.0)).ends_s != single.ends_s


def test_a_step_loads_each_of_its_experts_once() -> None:
    """Eight tokens of two experts need at most eight loads a layer together, and single ones sixteen."""
    together, single = (decode(replace(FORECAST, draft=most), steps(load_s=1.0)).loads for most in (3, 1))
    assert together < single <= 41 * LAYERS * TOP_K
    assert decode(FORECAST, steps(load_s=1.0), experts=TOP_K).loads < single


def test_loads_of_one_slot_are_begun_when_the_expert_before_has_left_it() -> None:
    """Two experts on two nodes, both needed in every layer: a layer takes at least a load and what is computed before
    the slot is free."""
    load_s = 1000.0
    found = decode(FORECAST, steps(load_s=load_s, nodes=2), experts=TOP_K, nodes=2)
    per_step_s = found.ends_s[-1] - found.ends_s[-5]
    assert LAYERS * load_s < per_step_s < LAYERS * (load_s + 4 * 1.0 + TOP_K * 2.0 * (1 + 3 * EXTRA_ROW))
    assert found.stall_share > 0.9


def test_wrong_forecasts_are_loaded_again() -> None:
    assert decode(FORECAST, steps(load_s=1.0)).reloads == 0
    assert decode(replace(FORECAST, recall=(0.5,)), steps(load_s=1.0)).reloads > 0


def test_a_slow_shadow_has_few_guesses() -> None:
    slow, fast = (decode(FORECAST, steps(shadow_s=shadow_s)) for shadow_s in (50.0, 0.1))
    assert len(set(slow.ends_s)) == 41
    assert len(set(fast.ends_s)) < 20


def test_what_the_shadow_has_said_by_when() -> None:
    times = steps(shadow_s=0.5)
    shadow = Ahead(replace(FORECAST, run_ahead=2), times, layers=LAYERS, random=drafts.Random(0))
    shadow.aligned(0, 10.0)
    assert [shadow.has_begun(position) for position in range(4)] == [True, True, True, False]
    assert shadow.known_s(1, 3) == pytest.approx(10.0 + 2 * LAYERS * 0.5)
    assert shadow.guesses(0, 12.4, most=3) == 0
    assert shadow.guesses(0, 12.5, most=3) == 1, "with the first layer of the position"
    assert shadow.guesses(0, 99.0, most=3) == 2
    shadow.begin_anew(1, 20.0)
    assert not shadow.has_begun(1)
    assert shadow.guesses(0, 99.0, most=3) == 0
    shadow.aligned(1, 20.0)
    assert shadow.known_s(1, 0) == pytest.approx(20.5)


def test_the_command_asks_for_guesses(capsys: pytest.CaptureFixture[str]) -> None:
    asked = settings.parse(PlanSettings, ["--draft", "3", "--run-ahead", "8"], prog="odmoe plan")
    question = question_of(asked)
    assert (question.forecast.draft, question.machines.group_size) == (3, 8)
    for options, says in (
        (["--draft", "3"], "--draft needs --run-ahead"),
        (["--draft", "3", "--run-ahead", "8", "--align-kv", "4"], "--draft needs --run-ahead"),
        (["--draft", "3", "--predictor", "none"], "--draft says nothing without --predictor shadow"),
    ):
        with pytest.raises(SystemExit):
            settings.parse(PlanSettings, options, prog="odmoe plan")
        assert says in capsys.readouterr().err
