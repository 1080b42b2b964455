"""How far the gates have come, when a position is due, and the order of loads that follows from it. Pure."""

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from odmoe_node.events import ExpertKey
from odmoe_node.progress import Progress
from odmoe_wire.messages import Span
from support.node_rig import NodeRig

LAST_LAYER = 8


def block(first: int, width: int, *, sequence: int = 1) -> list[Span]:
    """What a step takes that verifies guesses."""
    return [Span(sequence, first + number) for number in range(width)]


class TestWhenAPositionIsDue:
    def test_a_sequence_that_begins_takes_one_position_a_step(self) -> None:
        progress = Progress()
        assert [progress.due(1, position) for position in (40, 41, 44)] == [(1, 0), (2, 0), (5, 0)]

    def test_blocks_are_expected_to_be_as_wide_as_the_latest(self) -> None:
        progress = Progress()
        progress.pass_by(block(10, 3), 0)
        assert progress.due(1, 12) == (1, 2), "the present step"
        assert [progress.due(1, position) for position in (13, 15, 16, 20)] == [(2, 0), (2, 2), (3, 0), (4, 1)]

    def test_a_part_of_a_prompt_is_one_span_however_long(self) -> None:
        progress = Progress()
        progress.pass_by([Span(1, 0, 64)], 0)
        assert [progress.due(1, position) for position in (64, 65)] == [(2, 0), (3, 0)]

    def test_sequences_that_step_together_are_due_together(self) -> None:
        progress = Progress()
        progress.pass_by([*block(10, 2), *block(300, 1, sequence=2)], 0)
        assert [progress.due(1, 12), progress.due(2, 301), progress.due(3, 7)] == [(2, 0)] * 3
        progress.pass_by([*block(10, 2), *block(300, 1, sequence=2)], 5)
        assert progress.step == 1, "the same step, further on"

    def test_who_was_not_in_the_latest_step_may_be_in_the_next(self) -> None:
        progress = Progress()
        for number in range(4):
            progress.pass_by(block(10 + number, 1), 0)
        progress.pass_by([Span(2, 0, 16)], 0)
        assert [progress.due(1, 14), progress.due(2, 16)] == [(6, 0)] * 2

    def test_after_the_end_nothing_is_known(self) -> None:
        progress = Progress()
        progress.pass_by(block(10, 4), 3)
        progress.forget(1)
        assert not progress.is_past(Span(1, 10), 0)
        assert progress.due(1, 11) == (2, 0)


class TestGoingBack:
    def test_a_guess_that_was_wrong_is_due_anew_and_what_was_right_is_past(self) -> None:
        progress = Progress()
        progress.pass_by(block(10, 4), LAST_LAYER)
        progress.roll_back(1, 12)
        assert progress.is_past(Span(1, 11), LAST_LAYER)
        assert not progress.is_past(Span(1, 12), 0)
        assert [progress.due(1, position) for position in (12, 15, 16)] == [(2, 0), (2, 3), (3, 0)]

    def test_the_first_token_of_a_step_is_no_guess(self) -> None:
        """The shadow had another one there, and hears of it while the step is under way."""
        progress = Progress()
        progress.pass_by(block(12, 1), 3)
        progress.roll_back(1, 12)
        assert progress.is_past(Span(1, 12), 3), "else its forecasts would be loaded in vain"
        assert not progress.is_past(Span(1, 12), 4)

    def test_a_word_that_was_on_its_way_does_not_undo_it(self) -> None:
        progress = Progress()
        progress.pass_by(block(10, 4), 3)
        progress.roll_back(1, 12)
        passed = progress.pass_by(block(10, 4), LAST_LAYER)
        assert (passed[1].last, passed[1].layer) == (11, LAST_LAYER)
        assert not progress.is_past(Span(1, 12), 0)

    def test_without_a_rollback_the_servers_next_step_tells(self) -> None:
        """A predictor that was replaced takes nothing back."""
        progress = Progress()
        progress.pass_by(block(10, 4), LAST_LAYER)
        assert progress.is_past(Span(1, 13), 0)
        progress.pass_by(block(12, 2), 0)
        assert progress.is_past(Span(1, 13), 0)
        assert not progress.is_past(Span(1, 13), 1)
        assert not progress.is_past(Span(1, 14), 0)


def loads_of(node: NodeRig) -> list[ExpertKey]:
    """All that is still loaded, in order; the first is on its way already."""
    order = []
    while node.loading:
        order.append(node.end_load())
    return order


def busy(spans: Sequence[Span]) -> NodeRig:
    """A node that has just computed a step's first layer, and whose link is busy with another sequence's expert."""
    node = NodeRig(num_slots=64)
    node.compute(0, [0], spans=spans)
    node.finish()
    node.load(0, [7], span=Span(9, 0, 4))
    return node


class TestTheOrderOfLoads:
    def test_a_server_that_takes_a_token_a_step_needs_them_position_by_position(self) -> None:
        node = busy(block(10, 1))
        for position in (10, 11, 12):
            for layer in (2, 1):
                node.forecast(layer, [position - 10], position=position)
        assert loads_of(node)[1:] == [(1, 0), (2, 0), (1, 1), (2, 1), (1, 2), (2, 2)]

    def test_a_server_that_verifies_guesses_needs_them_layer_by_layer_the_certain_one_first(self) -> None:
        node = busy(block(10, 2))
        for position in (11, 10, 12, 13, 14):
            for layer in (2, 1):
                node.forecast(layer, [position - 10], position=position)
        assert loads_of(node)[1:] == [(1, 0), (1, 1), (2, 0), (2, 1), (1, 2), (1, 3), (2, 2), (2, 3), (1, 4), (2, 4)]

    def test_sequences_that_step_together_are_served_layer_by_layer(self) -> None:
        node = busy([*block(10, 1), *block(300, 1, sequence=2)])
        for sequence, position in ((1, 10), (1, 11), (2, 300), (2, 301)):
            for layer in (1, 2):
                node.forecast(layer, [sequence], sequence=sequence, position=position)
        of_a_step = [(1, 1), (1, 2), (2, 1), (2, 2)]
        assert loads_of(node)[1:] == of_a_step, "the next step's are the same experts"
        node.compute(1, [3], spans=[*block(10, 1), *block(300, 1, sequence=2)])
        node.finish()
        assert node.held == {*of_a_step, (0, 7)}

    def test_other_steps_than_expected_change_the_order(self) -> None:
        node = busy(block(10, 1))
        for position in (11, 12, 13):
            for layer in (1, 2):
                node.forecast(layer, [position - 10], position=position)
        node.compute(0, [0], spans=block(11, 2))
        order = loads_of(node)[1:]
        assert order == [(0, 0), (1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (2, 3)]

    def test_a_need_of_a_sequence_that_joins_does_not_wait_for_what_others_need_later(self) -> None:
        node = busy(block(10, 1))
        for position in range(11, 15):
            node.forecast(1, [position - 10], position=position)
        node.forecast(1, [5], sequence=2, position=40)
        assert loads_of(node)[1:] == [(1, 1), (1, 5), (1, 2), (1, 3), (1, 4)]


@settings(max_examples=100, deadline=None)
@given(
    width=st.integers(1, 4),
    said=st.lists(st.tuples(st.integers(0, 11), st.integers(1, 5)), unique=True, min_size=1, max_size=30),
)
def test_loads_come_by_step_then_layer_whatever_was_said_first(width: int, said: list[tuple[int, int]]) -> None:
    """With blocks of one position this is position by position."""
    node = busy(block(0, width))
    for position, layer in said:
        node.forecast(layer, [position], position=position)
    expected = sorted(said, key=lambda at: (at[0] // width, at[1], at[0] % width))
    assert loads_of(node)[1:] == [(layer, position) for position, layer in expected]


@settings(max_examples=100, deadline=None)
@given(width=st.integers(2, 5), wanted=st.lists(st.sets(st.integers(0, 3), min_size=1), min_size=1, max_size=5))
def test_an_expert_stays_until_all_of_its_block_are_served(width: int, wanted: list[set[int]]) -> None:
    """Loaded once, computed once, gone with the compute of its layer."""
    node = NodeRig(num_slots=8)
    node.release(LAST_LAYER, position=9)
    for ahead, experts in enumerate(wanted[:width]):
        node.forecast(1, sorted(experts), position=10 + ahead)
    node.finish()
    union = set[int]().union(*wanted[:width])
    assert node.held == {(1, expert) for expert in union}
    node.compute(0, [7], spans=block(10, width))
    node.finish()
    assert node.held == {(1, expert) for expert in union}
    node.compute(1, sorted(union), spans=block(10, width))
    node.finish()
    assert set(node.outcomes().values()) == {"hit"}
    assert (node.held, node.state.num_wants, node.state.counters.loads) == (set(), 0, len(union) + 1)


def test_one_slot_goes_through_a_layers_experts_and_then_on_to_the_next_layer() -> None:
    node = NodeRig(num_slots=1)
    node.compute(0, [0], spans=block(10, 2))
    node.finish()
    for layer in (4, 8):
        node.forecast(layer, [layer], position=10)
        node.forecast(layer, [layer, layer + 1], position=11)
    assert node.end_load() == (4, 4)
    assert node.loading == [], "what is certain keeps the slot until the gates have spoken"
    node.compute(4, [4, 5], spans=block(10, 2))
    node.end_compute()
    assert node.end_load() == (4, 5)
    node.end_compute()
    assert node.outcomes() == {4: "hit", 5: "miss"}
    assert node.load_keys == [(8, 8)]
