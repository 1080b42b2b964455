"""A node of one slot, step by step, as the pipeline wants it: the link is never idle while anything may be loaded."""

from odmoe_node.events import Answer, BreakOff, ComputeDone, LoadDone, LoadStopped, Mention, StartCompute, StartLoad
from odmoe_node.pace import Pace
from support.node_rig import NodeRig


def kinds(node: NodeRig) -> list[type]:
    """What the last event led to, in order."""
    return [type(action) for action in node.actions]


def test_a_round_of_right_forecasts_keeps_the_link_busy_whenever_the_slot_is_free() -> None:
    """Layers 0 and 4 are this node's; the shadow is a token ahead."""
    node = NodeRig(num_slots=1)
    for position in (5, 6):
        for layer in (0, 4):
            node.forecast(layer, [position], position=position)
    for position in (5, 6):
        for layer in (0, 4):
            assert node.load_keys == [(layer, position)], "in the order in which the gates will speak"
            node.end_load()
            assert node.loading == []
            node.compute(layer, [position], position=position)
            assert kinds(node) == [StartCompute]
            node.end_compute()
    assert node.state.counters.loads == 4
    assert node.state.counters.loads_unused == 0
    assert {timing.outcome for answer in node.answers for timing in answer.timings} == {"hit"}  # type: ignore[union-attr]


def test_the_next_load_starts_with_the_end_of_the_compute_and_before_its_answer_is_written() -> None:
    node = NodeRig(num_slots=1)
    node.forecast(0, [1])
    node.forecast(4, [2])
    node.end_load()
    assert kinds(node) == [Mention]
    node.compute(0, [1])
    node.end_compute()
    assert kinds(node) == [StartLoad, Answer]


def test_a_compute_starts_before_the_next_load_and_both_before_the_news() -> None:
    node = NodeRig(num_slots=2)
    node.compute(0, [1])
    node.forecast(4, [2])
    node.end_load()
    assert kinds(node) == [StartCompute, StartLoad, Mention]


def test_a_wrong_expert_in_the_slot_gives_way_the_moment_the_gate_speaks() -> None:
    node = NodeRig(num_slots=1)
    node.forecast(0, [1])
    node.forecast(4, [2])
    node.end_load()
    node.compute(0, [3])
    assert node.load_keys == [(0, 3)], "not that of layer 4"
    node.end_load()
    node.end_compute()
    assert node.load_keys == [(4, 2)]


def test_a_wrong_expert_on_its_way_gives_way_the_moment_the_gate_speaks() -> None:
    node = NodeRig(num_slots=1)
    node.forecast(0, [1])
    node.forecast(4, [2])
    node.compute(0, [3])
    assert node.actions == [BreakOff(0)]
    node.event(LoadStopped(node.loading.pop().slot, 0.01))
    node.stopping.clear()
    assert node.load_keys == [(0, 3)]


def test_a_forecast_loaded_early_gives_way_to_a_need_and_comes_back_after_it() -> None:
    node = NodeRig(num_slots=1)
    node.forecast(4, [2])
    node.end_load()
    node.compute(0, [3])
    assert node.load_keys == [(0, 3)]
    node.end_load()
    assert kinds(node) == [StartCompute, Mention]
    node.end_compute()
    assert kinds(node) == [StartLoad, Answer]
    assert node.load_keys == [(4, 2)]


def test_released_without_work_the_node_goes_on_to_its_next_layer_at_once() -> None:
    node = NodeRig(num_slots=1)
    node.forecast(0, [1])
    node.forecast(4, [2])
    node.end_load()
    node.release(0)
    assert node.load_keys == [(4, 2)]


def test_a_later_tokens_forecast_gives_way_to_this_tokens() -> None:
    node = NodeRig(num_slots=1)
    node.forecast(0, [1], position=5)
    node.end_load()
    node.compute(0, [1], position=5)
    node.forecast(0, [9], position=6)
    node.end_compute()
    node.end_load()
    assert node.held == {(0, 9)}
    node.forecast(4, [2], position=5)
    assert node.load_keys == [(4, 2)]
    node.end_load()
    node.compute(4, [2], position=5)
    node.end_compute()
    assert node.load_keys == [(0, 9)]


def test_a_compute_is_brief_when_the_last_one_was_and_there_is_one_slot() -> None:
    for num_slots, compute_s, rows, brief in (
        (1, 0.01, 1, True),
        (1, 0.01, 6, False),
        (1, 0.06, 1, False),
        (2, 0.01, 1, False),
    ):
        node = NodeRig(num_slots=num_slots)
        node.compute(0, [1])
        node.end_load()
        assert not node.state.is_brief(node.computing[0]), "nothing is known yet"
        node.event(ComputeDone(node.computing.pop().slot, compute_s))
        node.compute(1, [1], rows=rows)
        node.end_load()
        assert node.state.is_brief(node.computing[0]) is brief


def test_fewer_rows_are_not_taken_to_be_quicker() -> None:
    pace = Pace()
    pace.took([8], 0.08)
    assert (pace.at_most_s([1]), pace.at_most_s([8]), pace.at_most_s([16])) == (0.08, 0.08, 0.16)


def test_a_load_is_awaited_by_its_compute_and_by_a_load_that_could_follow() -> None:
    node = NodeRig(num_slots=1)
    node.forecast(0, [1])
    assert not node.state.awaits_load
    node.forecast(4, [2])
    assert not node.state.awaits_load, "it will keep its slot until the gate has spoken"
    node.compute(0, [1])
    assert node.state.awaits_load
    early = NodeRig(num_slots=1)
    early.forecast(4, [2])
    early.forecast(0, [1])
    assert early.state.awaits_load, "it will give way to what is needed sooner"
    two = NodeRig(num_slots=2)
    two.forecast(0, [1, 2])
    assert two.state.awaits_load, "the link could take the next"


def test_nothing_is_loaded_while_the_only_slot_is_computed() -> None:
    node = NodeRig(num_slots=1)
    node.compute(0, [1])
    node.event(LoadDone(node.loading.pop().slot, 0.5, 0.0))
    node.forecast(4, [2])
    assert node.loading == []
    node.event(ComputeDone(node.computing.pop().slot, 0.25))
    assert node.load_keys == [(4, 2)]
