"""The choice of alpha for a time budget: curves and choices worked out by hand."""

import pytest

from odmoe_server.bench.importance.tuning import NoAlphaError, Point, fit, smallest


def test_a_line_is_found_again_and_met_at_its_hundredth() -> None:
    curve = fit([Point(alpha=alpha, tpot_ms=200 - 100 * alpha) for alpha in (0.0, 0.2, 0.4, 0.6)])

    assert curve.at(0.3) == pytest.approx(170)
    assert smallest(curve, tpot_ms=174.5) == 0.26  # 0.255 would do; hundredths are proposed
    assert smallest(curve, tpot_ms=500) == 0.0


def test_a_bend_is_found_again() -> None:
    curve = fit([Point(alpha=alpha, tpot_ms=100 * (1 - alpha) ** 2) for alpha in (0.0, 0.25, 0.5)])

    assert smallest(curve, tpot_ms=100 * 0.7**2 + 1e-6) == 0.3


def test_what_no_measured_alpha_reaches_is_refused_with_the_least() -> None:
    curve = fit([Point(alpha=0.0, tpot_ms=200), Point(alpha=0.5, tpot_ms=150)])

    with pytest.raises(NoAlphaError, match=r"no alpha up to 0\.5 comes to 100 ms a token: 150\.0 ms at 0\.5"):
        smallest(curve, tpot_ms=100)


def test_one_alpha_makes_no_curve() -> None:
    with pytest.raises(ValueError, match="two alphas"):
        fit([Point(alpha=0.2, tpot_ms=200), Point(alpha=0.2, tpot_ms=210)])
