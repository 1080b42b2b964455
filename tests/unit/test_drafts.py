"""What the server knows of the tokens the shadow went on with: what was said last, without gaps, and no more of it."""

import pytest

from odmoe_server.cluster.drafts import MAX_POSITIONS, MAX_SEQUENCES, Drafts
from odmoe_wire.messages import Rollback, Schedule, Span


def told(drafts: Drafts, position: int, *tokens: int, sequence: int = 1) -> bool:
    return drafts.said(
        Schedule(span=Span(sequence, position, len(tokens) or 1), layer=0, experts=[3], tokens=list(tokens))
    )


@pytest.fixture
def drafts() -> Drafts:
    """Of sequence 1: 50 and 60 at 5 and 6, 80 at 8."""
    drafts = Drafts()
    assert told(drafts, 5, 50, 60)
    assert told(drafts, 8, 80)
    return drafts


def test_drafts_go_on_to_the_first_gap_and_as_far_as_asked(drafts: Drafts) -> None:
    assert drafts.after(1, 5, 16) == (50, 60)
    assert drafts.after(1, 5, 1) == (50,)
    assert drafts.after(1, 5, 0) == drafts.after(1, 5, -1) == drafts.after(1, 7, 16) == ()
    assert told(drafts, 7, 70)
    assert drafts.after(1, 5, 16) == (50, 60, 70, 80)


def test_only_what_was_made_behind_the_true_token_counts(drafts: Drafts) -> None:
    assert drafts.after(1, 6, 16, behind=50) == (60,)
    assert drafts.after(1, 6, 16, behind=51) == ()
    assert drafts.after(1, 5, 16, behind=40) == (), "nothing is known of the position before"


def test_a_layer_without_tokens_says_nothing(drafts: Drafts) -> None:
    assert not told(drafts, 5)
    assert drafts.after(1, 5, 16) == (50, 60)


def test_what_was_rolled_back_is_gone_and_may_be_said_anew(drafts: Drafts) -> None:
    drafts.rollback(Rollback(sequence=1, position=6))
    drafts.rollback(Rollback(sequence=9, position=0))
    assert drafts.after(1, 5, 16) == (50,)
    assert told(drafts, 6, 61)
    assert told(drafts, 7, 71)
    assert drafts.after(1, 5, 16) == (50, 61, 71), "what was said of 8 was behind another token"


def test_sequences_are_apart_and_forgotten(drafts: Drafts) -> None:
    assert told(drafts, 5, 7, sequence=2)
    drafts.forget(1)
    drafts.forget(1)
    assert drafts.after(1, 5, 16) == ()
    assert drafts.after(2, 5, 16) == (7,)
    drafts.clear()
    assert drafts.after(2, 5, 16) == ()


def test_memory_is_bounded_and_keeps_the_newest() -> None:
    drafts = Drafts()
    for position in range(3 * MAX_POSITIONS):
        told(drafts, position, position)
    assert drafts.after(1, 3 * MAX_POSITIONS - 2, 16) == (3 * MAX_POSITIONS - 2, 3 * MAX_POSITIONS - 1)
    assert len(drafts.after(1, 2 * MAX_POSITIONS, 3 * MAX_POSITIONS)) == MAX_POSITIONS
    assert drafts.after(1, 2 * MAX_POSITIONS - 1, 1) == ()
    for sequence in range(2, MAX_SEQUENCES + 1):
        told(drafts, 0, 4, sequence=sequence)
    assert told(drafts, 200, 5)
    told(drafts, 0, 4, sequence=MAX_SEQUENCES + 1)
    assert drafts.after(2, 0, 1) == (), "the one least recently heard of"
    assert drafts.after(1, 200, 1) == (5,)
