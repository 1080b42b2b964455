"""The planner's simulation of decoding, against times that can be worked out by hand."""

import math
from dataclasses import replace
from random import Random

import pytest

from odmoe_server.planner.answer import Question, answer, speed
from odmoe_server.planner.forecasts import Forecast, right
from odmoe_server.planner.machines import Device, Machines, Network, Node, Times, times
from odmoe_server.planner.shape import named
from odmoe_server.planner.simulate import Decoded, decode

EARLY = Forecast(align_token=0, align_kv=0)
WRONG = replace(EARLY, recall=(0.0,))
NONE = Forecast(source="none")
LAYERS = 24


def machines(nodes: int, *, group_size: int = 2, slots: int = 1) -> Machines:
    return Machines(
        nodes=(Node(slots=slots, link_gb_per_s=1.0),) * nodes,
        group_size=group_size,
        device=Device(memory_gb_per_s=1, tflops=1, overhead_s=0),
        network=Network(latency_s=0, gbit_per_s=1),
        shadow_bits=8,
    )


def steps(nodes: int, *, main_s: float = 2.0, expert_s: float = 1.5, load_s: float = 10.0, **others: float) -> Times:
    rest = {"shadow_s": 0.0, "row_s": 0.0, "kv_s": 0.0, "latency_s": 0.0, **others}
    return Times(main_s=main_s, expert_s=expert_s, load_s=(load_s,) * nodes, **rest)


def run(
    rig: Machines,
    times: Times,
    forecast: Forecast,
    *,
    top_k: int = 2,
    tokens: int = 4,
    layers: int = LAYERS,
    seed: int = 0,
) -> Decoded:
    return decode(rig, times, forecast, layers=layers, num_experts=8, top_k=top_k, tokens=tokens, seed=seed)


def asked(rig: Machines, forecast: Forecast, *, tokens: int) -> Question:
    """A question about Mixtral-8x7B in 8 bits."""
    return Question(
        shape=named("mixtral-8x7b", weight_bits=8),
        machines=rig,
        forecast=forecast,
        prompt_tokens=1,
        output_tokens=tokens,
        prefill_overlap=False,
        seed=0,
    )


def last_token_s(decoded: Decoded) -> float:
    """The last token's time, when the first ones have filled the pipeline."""
    return decoded.ends_s[-1] - decoded.ends_s[-2]


def toy_token_s(*, main_s: float, expert_s: float, load_s: float, groups: int, known_s: list[float]) -> float:
    """The reference: one token, groups that load and compute in step (the papers' notes, appendix)."""
    free, now = [0.0] * groups, 0.0
    for layer, known in enumerate(known_s):
        gate = now + main_s
        loaded = max(free[layer % groups], min(known, gate)) + load_s
        now = free[layer % groups] = max(gate, loaded) + expert_s
    return now


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("forecast", [EARLY, NONE])
def test_one_token_is_that_of_the_toy_model(seed: int, forecast: Forecast) -> None:
    random = Random(seed)
    groups, top_k = random.randint(1, 8), random.randint(1, 4)
    main_s, expert_s, load_s, shadow_s = (random.uniform(0.1, limit) for limit in (4, 3, 30, 2))
    known_s = [math.inf if forecast is NONE else (layer + 1) * shadow_s for layer in range(LAYERS)]
    wanted = toy_token_s(main_s=main_s, expert_s=expert_s, load_s=load_s, groups=groups, known_s=known_s)
    nodes = groups * top_k
    timed = steps(nodes, main_s=main_s, expert_s=expert_s, load_s=load_s, shadow_s=shadow_s)
    decoded = run(machines(nodes, group_size=top_k), timed, forecast, top_k=top_k, tokens=1)
    assert decoded.ends_s[0] == pytest.approx(wanted)


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 6, 8])
def test_loads_are_hidden_up_to_the_bound_and_not_beyond(groups: int) -> None:
    bound_s = groups * 2.0 + (groups - 1) * 1.5
    for load_s, per_layer_s in [(bound_s, 3.5), (bound_s * 1.1, (bound_s * 1.1 + 1.5) / groups)]:
        decoded = run(machines(2 * groups), steps(2 * groups, load_s=load_s), EARLY)
        assert last_token_s(decoded) == pytest.approx(LAYERS * per_layer_s)


@pytest.mark.parametrize("load_s", [0.1, 5.0, 12.5, 12.6, 28.0, 100.0])
def test_steady_state_is_the_slower_of_compute_and_loads(load_s: float) -> None:
    decoded = run(machines(8), steps(8, load_s=load_s), EARLY)
    assert last_token_s(decoded) == pytest.approx(LAYERS * max(3.5, (load_s + 1.5) / 4))


def test_a_second_slot_lets_a_group_load_while_it_computes() -> None:
    for load_s, per_layer_s in [(14.0, 3.5), (16.0, 4.0)]:
        decoded = run(machines(8, slots=2), steps(8, load_s=load_s), EARLY)
        assert last_token_s(decoded) == pytest.approx(LAYERS * per_layer_s)


def test_without_forecasts_every_layer_waits_for_its_load() -> None:
    decoded = run(machines(8), steps(8), NONE)
    assert decoded.ends_s[-1] == pytest.approx(4 * LAYERS * 13.5)
    assert decoded.stalled_s == pytest.approx(4 * LAYERS * 10)
    assert decoded.reloads == decoded.loads == 4 * LAYERS * 2


def test_wrong_forecasts_are_loaded_anew() -> None:
    decoded = run(machines(8), steps(8), WRONG)
    assert decoded.reloads == 4 * LAYERS * 2
    assert last_token_s(decoded) == pytest.approx(LAYERS * 13.5)


def test_a_wrong_load_that_has_begun_is_broken_off() -> None:
    """One node: the wrong load begins when it is free, 2 before the gate, and the right one takes its place."""
    decoded = run(machines(1, group_size=1), steps(1), WRONG, top_k=1)
    assert last_token_s(decoded) == pytest.approx(LAYERS * (2 + 10 + 1.5))
    assert decoded.broken_off == 4 * LAYERS


def test_a_shadow_that_is_ahead_knows_no_bounds_of_tokens() -> None:
    """One layer in many tokens takes as long as many layers in few, loads that have begun included."""
    rig = machines(1, group_size=1, slots=2)
    many, few = (
        run(rig, steps(1, main_s=15.0), WRONG, top_k=1, layers=layers, tokens=48 // layers) for layers in (1, 24)
    )
    assert many.ends_s[-1] == pytest.approx(few.ends_s[-1])


def test_a_forecast_that_comes_after_the_gate_is_of_no_use() -> None:
    late = run(machines(8), steps(8, shadow_s=1000.0), replace(EARLY, align_token=1))
    assert late.ends_s == pytest.approx(run(machines(8), steps(8), NONE).ends_s)


@pytest.mark.parametrize(
    ("slots", "per_layer_s"), [(1, 2 + 4 * (10 + 1.5)), (2, 2 + 4 * 10 + 1.5), (4, 2 + 4 * 10 + 1.5)]
)
def test_one_node_that_has_all_of_a_layers_experts(slots: int, per_layer_s: float) -> None:
    decoded = run(machines(1, group_size=4, slots=slots), steps(1), NONE, top_k=4)
    assert decoded.ends_s[0] == pytest.approx(LAYERS * per_layer_s)


@pytest.mark.parametrize(
    ("nodes", "group_size", "top_k", "layers"),
    [(7, 2, 2, 32), (5, 2, 3, 31), (3, 4, 2, 5), (64, 8, 8, 58), (1, 1, 8, 3)],
)
def test_counts_that_do_not_divide(nodes: int, group_size: int, top_k: int, layers: int) -> None:
    rig, timed = machines(nodes, group_size=group_size), steps(nodes)
    needed = 3 * layers * top_k
    perfect, half, wrong = (
        run(rig, timed, replace(EARLY, recall=(recall,)), top_k=top_k, tokens=3, layers=layers)
        for recall in (1, 0.5, 0)
    )
    assert perfect.reloads <= needed <= perfect.loads
    assert wrong.reloads == needed
    assert perfect.ends_s[-1] < half.ends_s[-1] <= wrong.ends_s[-1] * 1.001


def test_messages_take_their_time() -> None:
    """Two rows out, one after the other, and the second one back: the first came back meanwhile."""
    decoded = run(machines(2), steps(2, row_s=0.3, latency_s=0.2), NONE)
    assert decoded.ends_s[-1] == pytest.approx(4 * LAYERS * (13.5 + 2 * 0.3 + 0.2 + 0.2 + 0.3))


def test_rows_leave_one_after_the_other() -> None:
    """The second node gets its row second; its load is the longer one, so its result is the last to come back."""
    timed = replace(steps(2, row_s=0.3, latency_s=0.2), load_s=(10.0, 20.0))
    assert run(machines(2), timed, NONE).ends_s[-1] == pytest.approx(
        4 * LAYERS * (2 + 2 * 0.3 + 0.2 + 21.5 + 0.2 + 0.3)
    )


def test_a_node_computes_one_expert_at_a_time() -> None:
    """Four loads of 0.5 come faster than experts of 1.5 are computed."""
    decoded = run(machines(1, group_size=4, slots=4), steps(1, load_s=0.5), NONE, top_k=4)
    assert decoded.ends_s[0] == pytest.approx(LAYERS * (2 + 0.5 + 4 * 1.5))


@pytest.mark.parametrize("slots", [1, 2])
def test_the_bound_that_is_shown_counts_messages_in(slots: int) -> None:
    rig = replace(machines(8, slots=slots), main_s=1e-3, expert_s=1e-3, shadow_s=0.0)
    question = asked(rig, EARLY, tokens=3)
    bound_s = answer(question).hidden_load_s
    assert bound_s is not None
    timed = times(question.shape, rig)
    unhindered = last_token_s(run(rig, timed.without("loads"), EARLY, layers=32))
    at = [last_token_s(run(rig, replace(timed, load_s=(bound_s * by,) * 8), EARLY, layers=32)) for by in (0.999, 1.01)]
    assert at[0] == pytest.approx(unhindered)
    assert at[1] > unhindered * 1.001


def test_late_departure_costs_the_first_layers_their_lead() -> None:
    timed = steps(8, load_s=12.5, shadow_s=0.1)
    aligned, never = (run(machines(8), timed, forecast) for forecast in (Forecast(), EARLY))
    assert last_token_s(never) == pytest.approx(LAYERS * 3.5)
    # Layer 0 is known at 0.1, so its rows wait until 12.6 in place of 2; all else runs through.
    assert last_token_s(aligned) == pytest.approx(LAYERS * 3.5 + 10.6)


def test_keys_and_values_delay_the_shadow_only_when_they_are_due() -> None:
    timed = steps(8, load_s=12.5, shadow_s=0.1, kv_s=1.0)
    with_kv, token_only = (run(machines(8), timed, Forecast(align_kv=period)) for period in (1, 0))
    assert last_token_s(with_kv) == pytest.approx(last_token_s(token_only) + 1.0)
    assert run(machines(8), timed, Forecast(align_token=0)).ends_s == with_kv.ends_s
    every_other = run(machines(8), timed, Forecast(align_kv=2), tokens=5)
    # Token 3 has the token only, token 4 the keys and values of two.
    third, fourth = (every_other.ends_s[i] - every_other.ends_s[i - 1] for i in (3, 4))
    # Beyond 2, the gate of the layer asks before the shadow has begun.
    assert fourth - third == pytest.approx(1.9)


def test_a_shadow_that_runs_ahead_takes_the_late_departure_away() -> None:
    timed = steps(8, load_s=12.5, shadow_s=0.1)
    ahead, never_right = (
        run(machines(8), timed, Forecast(run_ahead=1, agreement=agreement), tokens=8) for agreement in (1.0, 0.0)
    )
    assert last_token_s(ahead) == pytest.approx(LAYERS * 3.5)
    assert never_right.ends_s == pytest.approx(run(machines(8), timed, Forecast(), tokens=8).ends_s)


def test_draws_are_seeded() -> None:
    halves = replace(EARLY, recall=(0.5,))
    first, again, other = (run(machines(8), steps(8), halves, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_recall_may_fall_from_token_to_token() -> None:
    falling = replace(EARLY, recall=(1.0, 0.0))
    decoded = run(machines(8), steps(8, load_s=1.0), falling, tokens=3)
    assert decoded.reloads == pytest.approx(2 * LAYERS * 2, abs=2)


def test_a_random_guess_finds_its_share() -> None:
    random = Random(0)
    found = [right(Forecast(source="random"), 0, num_experts=8, top_k=2, random=random) for _ in range(4000)]
    assert sum(map(sum, found)) / 8000 == pytest.approx(2 / 8, abs=0.02)
    assert sum(all(pair) for pair in found) / 4000 == pytest.approx(1 / 28, abs=0.01)


def test_one_slow_link_holds_all_up() -> None:
    even = steps(8, load_s=12.5)
    uneven = replace(even, load_s=(12.5,) * 7 + (25.0,))
    assert last_token_s(run(machines(8), uneven, EARLY)) > 1.5 * last_token_s(run(machines(8), even, EARLY))


def test_what_costs_nothing_costs_nothing() -> None:
    question = asked(machines(8), Forecast(recall=(0.9,)), tokens=8)
    found = answer(question)
    assert {name for name, _ in found.if_free} == {
        "loads", "network", "compute of server and nodes", "wrong forecasts", "waiting for the shadow"
    }  # fmt: skip
    assert all(tokens_per_s >= found.decoded.tokens_per_s for _, tokens_per_s in found.if_free)
    assert found.bound == "compute of server and nodes"
    fast = replace(question.machines, device=Device(memory_gb_per_s=1000, tflops=100, overhead_s=0))
    assert answer(replace(question, machines=fast)).bound == "loads"
    assert speed(question) == found.decoded.tokens_per_s
