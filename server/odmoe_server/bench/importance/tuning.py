"""The choice of alpha for a time budget, as SMoE makes it: a low polynomial through measured times. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

DEGREE: Final = 2
_STEP: Final = 0.01


class NoAlphaError(ValueError):
    """No alpha meets the budget; the message says what comes nearest."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """At this alpha a token took so long."""

    alpha: float
    tpot_ms: float


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Time a token by alpha, between the measured ends; `coefficients` from the highest power down."""

    coefficients: tuple[float, ...]
    least: float
    most: float

    def at(self, alpha: float) -> float:
        """Milliseconds a token."""
        return float(np.polyval(self.coefficients, alpha))


def fit(points: Sequence[Point]) -> Curve:
    """Least squares; a lower degree where there are fewer points. Raises ValueError for fewer than two alphas."""
    alphas = [point.alpha for point in points]
    degree = min(DEGREE, len(set(alphas)) - 1)
    if degree < 1:
        raise ValueError("a curve needs times at two alphas at least")
    found = np.polyfit(alphas, [point.tpot_ms for point in points], degree)
    return Curve(coefficients=tuple(float(c) for c in found), least=min(alphas), most=max(alphas))


def smallest(curve: Curve, *, tpot_ms: float) -> float:
    """The smallest alpha, in hundredths, at which a token takes no longer. Raises NoAlphaError."""
    first, last = round(curve.least / _STEP), round(curve.most / _STEP)
    times = {number: curve.at(number * _STEP) for number in range(first, last + 1)}
    for number, took_ms in times.items():
        if took_ms <= tpot_ms:
            return round(number * _STEP, 2)
    best = min(times, key=lambda number: (times[number], number))
    raise NoAlphaError(
        f"no alpha up to {curve.most:g} comes to {tpot_ms:g} ms a token: {times[best]:.1f} ms at {best * _STEP:g} is "
        "the least; give nodes more slots or faster links"
    )
