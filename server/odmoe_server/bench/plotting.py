"""Drawing, without a screen. The only place that imports matplotlib, and says how to get it."""

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOTS_PER_INCH: Final = 130
INSTALL: Final = "pip install 'odmoe[bench]'"


class NoPlottingError(ValueError):
    """matplotlib is missing; the message says how to get it."""


def require() -> None:
    """Raises NoPlottingError at once, rather than after an hour of measuring."""
    try:
        import matplotlib.figure  # noqa: F401 - only whether it can be had
    except ImportError as error:
        raise NoPlottingError(f"the benchmarks draw with matplotlib, which is missing: {INSTALL}") from error


def figure(*, width: float, height: float) -> "Figure":
    """An empty figure of so many inches; it belongs to no window."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DOTS_PER_INCH, layout="constrained")
