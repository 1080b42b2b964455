"""What is void when the full model's token comes: exactly what was forecast for another one, and what follows it."""

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
