"""Progress on the terminal: a bar for people, lines for logs. Knows rich; not what is in progress."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from odmoe_server import models

_LINE_EVERY_S = 10.0


@contextmanager
def shown(console: Console) -> Iterator[models.Progress]:
    """A function to call with what is being done and the fraction of it."""
    if not console.is_terminal:
        yield _lines(console)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("preparing", total=1.0)
        yield lambda what, fraction: bar.update(task, description=what, completed=fraction)


def _lines(console: Console) -> models.Progress:
    """A line now and then: at the first word, and when the last line is old."""
    last_s = float("-inf")

    def tell(what: str, fraction: float) -> None:
        nonlocal last_s
        if time.monotonic() - last_s >= _LINE_EVERY_S:
            last_s = time.monotonic()
            console.print(f"{what} ({fraction:.0%})")

    return tell
