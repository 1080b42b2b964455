"""Whose turn it is: who is waited for first, then everybody evenly, and nobody beyond the bound."""

from hypothesis import given
from hypothesis import strategies as st

from odmoe_predictor.turns import Turns
from odmoe_wire.messages import Span


def test_what_is_wanted_is_served_in_the_order_of_asking() -> None:
    turns = Turns(run_ahead=4)
    for sequence in (3, 1, 2):
        turns.want(Span(sequence, 10))
    assert [span.sequence for span in turns.wanted()] == [3, 1, 2]
    assert turns.take(1) == Span(1, 10)
    assert turns.stop(3) == Span(3, 10)
    assert [span.sequence for span in turns.wanted()] == [2]
    assert turns.stop(3) is None


def test_a_newer_wish_of_a_sequence_replaces_its_older() -> None:
    turns = Turns(run_ahead=4)
    turns.want(Span(1, 10))
    turns.want(Span(1, 11))
    assert turns.wanted() == [Span(1, 11)]


def test_who_is_least_far_ahead_comes_first_and_who_is_at_the_bound_not_at_all() -> None:
    turns = Turns(run_ahead=3)
    for sequence, position in ((1, 10), (2, 50), (3, 7), (4, 7)):
        turns.allow_ahead(Span(sequence, position))
    assert turns.ahead({1: 12, 2: 51, 3: 11, 9: 0}) == [2, 1]
    turns.stop(2)
    assert turns.ahead({1: 12, 2: 51}) == [1]
    turns.stop_all()
    assert turns.ahead({1: 12}) == []


def test_a_span_of_several_tokens_is_counted_from_its_end() -> None:
    turns = Turns(run_ahead=2)
    turns.allow_ahead(Span(1, 10, 3))
    assert turns.ahead({1: 14}) == [1]
    assert turns.ahead({1: 15}) == []


def test_without_running_ahead_there_is_nothing_to_go_on_with() -> None:
    turns = Turns(run_ahead=0)
    turns.allow_ahead(Span(1, 10))
    assert turns.ahead({1: 11}) == []


@given(
    run_ahead=st.integers(1, 16),
    positions=st.lists(st.integers(1, 100), min_size=1, max_size=6),
    accepted=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), max_size=20),
)
def test_all_get_ahead_evenly_and_to_the_bound(
    run_ahead: int, positions: list[int], accepted: list[tuple[int, int]]
) -> None:
    """Alignments come at any time; a turn is one token. Nobody has a turn while another is further behind."""
    turns = Turns(run_ahead=run_ahead)
    aligned = dict(enumerate(positions))
    lengths = {sequence: position + 1 for sequence, position in aligned.items()}
    for sequence, position in aligned.items():
        turns.allow_ahead(Span(sequence, position))

    def turn() -> bool:
        ahead = turns.ahead(lengths)
        distance = {sequence: lengths[sequence] - 1 - aligned[sequence] for sequence in aligned}
        assert sorted(ahead) == [sequence for sequence in aligned if distance[sequence] < run_ahead]
        if ahead:
            assert distance[ahead[0]] == min(distance.values())
            lengths[ahead[0]] += 1
        return bool(ahead)

    for sequence, tokens in accepted:
        turn()
        if sequence in aligned:
            aligned[sequence] += min(tokens, lengths[sequence] - 1 - aligned[sequence])
            turns.allow_ahead(Span(sequence, aligned[sequence]))
    while turn():
        pass
    assert all(lengths[sequence] == aligned[sequence] + 1 + run_ahead for sequence in aligned)
