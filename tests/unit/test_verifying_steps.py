"""Steps that take several tokens of a sequence, or several sequences, and go back where guesses were wrong: server and
nodes together, every event of every core checked."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from odmoe_server.cluster.peers import ClusterConfig
from odmoe_wire.messages import Placing, Span
from support.verifying import TOP_K, Verifying

RIGHT, GUESS = 0, 1  # tokens; what is behind a wrong guess is wrong too


def cluster(
    *, num_nodes: int = 4, num_slots: int = 64, placing: Placing = "expert", wrong: float = 0.0, seed: int = 0
) -> Verifying:
    config = ClusterConfig(
        store_digest="d",
        package_version="1",
        num_layers=4,
        num_experts=8,
        group_size=2,
        top_k=TOP_K,
        placing=placing,
        call_timeout_s=100.0,
    )
    return Verifying(config, num_nodes=num_nodes, num_slots=num_slots, wrong=wrong, seed=seed)


def run(run_of: Verifying, *, sequence: int, steps: list[tuple[int, int]]) -> int:
    """Decode: in each step so many guesses of the shadow are taken, of which so many are right; returns the position
    it came to."""
    at = 10
    for guesses, right in steps:
        tokens = [RIGHT] * (min(right, guesses) + 1) + [GUESS] * max(0, guesses - right)
        for ahead, token in enumerate(tokens):
            run_of.forecast(sequence, at + ahead, token)
        run_of.settle()
        run_of.step({sequence: (at, tokens)})
        at += min(right, guesses) + 1
    return at


def counted(cluster: Verifying, name: str) -> int:
    return sum(getattr(node.state.counters, name) for node in cluster.nodes.values())


def assert_nothing_left(cluster: Verifying) -> None:
    dispatch = cluster.state.dispatch
    assert not any((dispatch.calls, dispatch.requests, dispatch.forecasts, dispatch.unforeseen, dispatch._at))
    for node in cluster.nodes.values():
        assert (node.held, node.state.num_wants, node.state.num_requests) == (set(), 0, 0)
        progress = node.state._wants._progress
        assert progress._blocks.get(1) is progress._begins.get(1) is None


STEPS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(steps=STEPS, placing=st.sampled_from(["span", "expert"]))
def test_right_forecasts_are_all_used_however_often_the_server_goes_back(
    steps: list[tuple[int, int]], placing: Placing
) -> None:
    """Nothing of a position that is verified again counts as passed, on the nodes or the server."""
    verifying = cluster(placing=placing)
    run(verifying, sequence=1, steps=steps)
    assert counted(verifying, "late_forecasts") == 0
    assert verifying.state.dispatch.predicted_late_total == 0
    assert verifying.outcomes == {"hit"}
    verifying.end(1)
    assert_nothing_left(verifying)


@settings(max_examples=60, deadline=None)
@given(steps=STEPS)
def test_an_expert_that_several_guesses_want_is_loaded_once(steps: list[tuple[int, int]]) -> None:
    verifying = cluster()
    run(verifying, sequence=1, steps=steps)
    assert counted(verifying, "loads") == sum(len(call.counts) for call in verifying.called)


@settings(max_examples=60, deadline=None)
@given(
    steps=STEPS,
    num_slots=st.integers(1, 3),
    num_nodes=st.integers(1, 5),
    wrong=st.sampled_from([0.0, 0.3, 1.0]),
    placing=st.sampled_from(["span", "expert"]),
    seed=st.integers(0, 1000),
)
def test_with_few_slots_and_wrong_forecasts_all_is_computed_and_nothing_is_left(
    steps: list[tuple[int, int]], num_slots: int, num_nodes: int, wrong: float, placing: Placing, seed: int
) -> None:
    verifying = cluster(num_slots=num_slots, num_nodes=num_nodes, placing=placing, wrong=wrong, seed=seed)
    run(verifying, sequence=1, steps=steps)
    assert counted(verifying, "late_forecasts") == 0
    verifying.end(1)
    assert_nothing_left(verifying)


@pytest.mark.parametrize("placing", ["span", "expert"])
def test_sequences_that_step_together_share_loads_and_forget_one_another(placing: Placing) -> None:
    verifying = cluster(placing=placing)
    at = {1: 10, 2: 300, 3: 50}
    for number in range(6):
        blocks = {}
        for sequence, position in at.items():
            guesses = [RIGHT, GUESS][: (sequence + number) % 3]
            for ahead, token in enumerate([RIGHT, *guesses]):
                verifying.forecast(sequence, position + ahead, token)
            blocks[sequence] = (position, [RIGHT, *guesses])
            at[sequence] = position + 1 + guesses.count(RIGHT)
        verifying.settle()
        verifying.step(blocks)
        if number == 3:
            verifying.end(2)
            del at[2]
    assert verifying.outcomes == {"hit"}
    needed = sum(len(call.counts) for call in verifying.called)
    assert counted(verifying, "loads") == needed or placing == "span"
    for sequence in at:
        verifying.end(sequence)
    assert_nothing_left(verifying)


def test_a_forecast_for_the_guess_that_was_wrong_is_void_and_the_new_one_counts() -> None:
    verifying = cluster()
    for position, token in ((10, RIGHT), (11, RIGHT), (12, GUESS), (13, GUESS)):
        verifying.forecast(1, position, token)
    verifying.settle()
    verifying.step({1: (10, [RIGHT, RIGHT, GUESS, GUESS])})
    verifying.forecast(1, 12, RIGHT, layers=[0, 1])
    verifying.settle()
    dispatch = verifying.state.dispatch
    assert dispatch.predicted([Span(1, 12)], 0) == verifying.experts(1, 12, RIGHT, 0)
    held = {key for node in verifying.nodes.values() for key in node.held}
    assert held == {(layer, expert) for layer in (0, 1) for expert in verifying.experts(1, 12, RIGHT, layer)}
    verifying.step({1: (12, [RIGHT])})
    assert verifying.outcomes == {"hit", "miss"}, "the layers that were not forecast"


def test_while_a_step_is_under_way_its_own_late_forecasts_are_judged_not_kept() -> None:
    """The shadow had another token there, and hears of the right one when the step has begun."""
    verifying = cluster()
    verifying.forecast(1, 10, GUESS)
    verifying.step({1: (10, [RIGHT])})
    verifying.forecast(1, 10, RIGHT)
    dispatch = verifying.state.dispatch
    assert not dispatch.forecasts
    assert dispatch.predicted_late_total > 0
    assert counted(verifying, "late_forecasts") > 0
    verifying.settle()
    assert all(node.held == set() for node in verifying.nodes.values())


def test_a_server_that_goes_back_unasked_keeps_nothing_of_the_guesses() -> None:
    """The predictor was replaced: nobody takes its forecasts back."""
    verifying = cluster()
    verifying.step({1: (10, [RIGHT, GUESS, GUESS])})
    verifying.step({1: (11, [RIGHT])})
    assert set(verifying.state.dispatch.unforeseen) == {(1, 10), (1, 11)}
    verifying.forecast(1, 12, RIGHT)
    verifying.settle()
    verifying.step({1: (12, [RIGHT])})
    assert "hit" in verifying.outcomes
    verifying.end(1)
    assert_nothing_left(verifying)
