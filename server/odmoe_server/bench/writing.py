"""Puts a record's files where they belong and its table on the terminal. Knows no benchmark."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

from rich.console import Console

from odmoe_server.bench.record import Record

_LEAST_COLUMNS: Final = 150


def wide_console() -> Console:
    """For tables: as wide as the terminal, or wider where it is too narrow for them."""
    return Console(width=max(shutil.get_terminal_size().columns, _LEAST_COLUMNS))


def write(
    record: Record,
    directory: Path,
    *,
    draw: Callable[[Path], None],
    json_file: Path | None,
    console: Console | None = None,
) -> list[Path]:
    """The record as .md, .json and .png in `directory`, and once more as `json_file`; shows the table. Raises
    ValueError when a place cannot be written."""
    console = console or wide_console()
    paths = [directory / f"{record.stem}.{ending}" for ending in ("md", "json", "png")]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for path in (paths[1], *([json_file] if json_file else [])):
            path.write_text(record.json(), encoding="utf-8")  # first: measuring took longest
        paths[0].write_text(record.markdown(picture=paths[2].name), encoding="utf-8")
        draw(paths[2])
    except OSError as error:
        raise ValueError(f"the record cannot be written: {error}") from error
    console.print(record.table())
    for note in record.notes:
        console.print(note, highlight=False, soft_wrap=True)
    for path in paths:
        console.print(str(path), highlight=False, soft_wrap=True)
    return paths
