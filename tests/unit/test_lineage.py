"""What is void when the full model's token comes: exactly what was forecast for another one, and what follows it."""

from itertools import count

from hypothesis import given
from hypothesis import strategies as st

from odmoe_predictor.lineage import Lineage


def out(*positions: int) -> Lineage:
    """Forecasts of sequence 1, each for a token ten times its position."""
    lineage = Lineage()
    for position in positions:
        lineage.said(1, position, 10 * position)
    return lineage


def test_nothing_out_is_never_wrong() -> None:
    assert Lineage().aligned(1, 5, lambda at: 1) is None
    assert out(4).aligned(1, 5, lambda at: 1) is None, "it lies before"


def test_the_first_wrong_token_and_all_after_it_are_void_once() -> None:
    tokens = {5: 50, 6: 61}
    lineage = out(5, 6, 7)
    assert lineage.aligned(1, 5, tokens.get) == 6
    assert lineage.aligned(1, 5, tokens.get) is None
    assert lineage.aligned(1, 7, lambda at: 1) is None, "7 went with 6"


def test_a_right_token_leaves_what_was_made_from_it() -> None:
    lineage = out(5, 6, 7)
    assert lineage.aligned(1, 5, {5: 50}.get) is None
    assert lineage.aligned(1, 6, {6: 60}.get) is None
    assert lineage.aligned(1, 7, {7: 71}.get) == 7


def test_a_newer_forecast_of_a_position_counts() -> None:
    lineage = out(5)
    lineage.said(1, 5, 51)
    assert lineage.aligned(1, 5, {5: 51}.get) is None


def test_sequences_are_apart_and_forgotten() -> None:
    lineage = out(5)
    assert lineage.aligned(2, 5, lambda at: 1) is None
    lineage.forget(1)
    assert lineage.aligned(1, 5, lambda at: 1) is None
    lineage.said(1, 6, 60)
    lineage.forget_all()
    assert lineage.aligned(1, 6, lambda at: 1) is None


@given(
    depth=st.integers(1, 16),
    steps=st.lists(st.tuples(st.integers(0, 16), st.integers(0, 9), st.booleans()), min_size=1, max_size=12),
)
def test_no_receiver_keeps_what_was_forecast_behind_a_wrong_token(
    depth: int, steps: list[tuple[int, int, bool]]
) -> None:
    """The shadow runs ahead some of the way; then the full model has accepted some drafts and its next token is the
    shadow's or another. `held` is what a node was told and not told to forget."""
    lineage, held, tokens = Lineage(), dict[int, int](), {0: 0}
    drawn = count(1)
    aligned = 0
    lineage.said(1, 0, 0)
    for further, accepted, right in steps:
        for position in range(len(tokens), min(len(tokens) + further, aligned + depth + 1)):
            tokens[position] = held[position] = next(drawn)
            lineage.said(1, position, tokens[position])
        aligned = min(aligned + accepted + 1, len(tokens))
        stands = right and aligned in tokens
        if not stands:
            known = aligned in tokens
            tokens = {at: token for at, token in tokens.items() if at < aligned} | {aligned: next(drawn)}
        wrong = lineage.aligned(1, aligned, tokens.get)
        assert wrong == (None if stands or not known else aligned)
        if wrong is not None:
            held = {at: token for at, token in held.items() if at < wrong}
        if not stands:
            held[aligned] = tokens[aligned]
            lineage.said(1, aligned, tokens[aligned])
        assert {at: token for at, token in held.items() if at >= aligned} == {
            at: token for at, token in tokens.items() if at >= aligned
        }
