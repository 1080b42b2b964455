"""The bar that says how far a measurement is and how long it will take. Knows weights of phases, not what they are."""

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Meter(Progress):
    """A bar over phases of given weights, in order; a phase that ends early is filled up. Where there is no terminal
    to draw on, a line for each phase."""

    def __init__(self, weights: Sequence[float], *, console: Console) -> None:
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            speed_estimate_period=300,
            disable=not console.is_terminal,
        )
        self._weights = list(weights)
        self._begun = 0
        self._bar = self.add_task("", total=sum(weights))

    def phase(self, description: str, *, units: int) -> Callable[[], None]:
        """Begin the next phase; the result is to be called after each of its units."""
        done, weight = sum(self._weights[: self._begun]), self._weights[self._begun]
        self._begun += 1
        self.update(self._bar, description=description, completed=done)
        if self.disable:
            self.console.log(f"{done / sum(self._weights):.0%} {description}", highlight=False, _stack_offset=2)
        return lambda: self.advance(self._bar, weight / units)
