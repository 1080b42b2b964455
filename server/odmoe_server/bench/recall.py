"""`odmoe bench recall`: has the predictor's own program measure, or takes a file that it wrote, and makes the record.

Knows the form of that file; nothing of shadows.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from odmoe_server.bench.record import Column, Machine, Record

PROGRAM: Final = "odmoe_predictor.recall"
MEASURED_S: Final = 6 * 3600.0
_STOP_S: Final = 10.0
COLUMNS: Final = (
    Column("predictor", "predictor"),
    Column("precision", "precision"),
    Column("scope", "scope"),
    Column("token every", "align_token"),
    Column("KV every", "align_kv"),
    Column("prompt KV", "prompt_kv"),
    Column("run-ahead", "run_ahead"),
    Column("layers ahead", "layers_ahead"),
    Column("recall, %", "recall", 2, 100),
    Column("layers forecast, %", "covered", 1, 100),
    Column("guesses right, %", "agreement", 2, 100),
    Column("tokens", "tokens", 0),
    Column("MB", "bytes", 1, 1e-6),
    Column("ms a step", "ms_per_step", 1),
)


class RecallError(ValueError):
    """There is nothing to draw; the message says why."""


def measured(store: Path, *, quick: bool, directory: Path) -> dict[str, Any]:
    """What the program found. Its progress goes where this process's does; its file stays in `directory` if it does
    not come to its end, for `--from`. Raises RecallError."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecallError(f"{directory} cannot be written: {error}") from error
    file = directory / "recall.unfinished.json"
    command = [sys.executable, "-m", PROGRAM, "--store", str(store), "--json", str(file)]
    status = _status([*command, *(["--quick"] if quick else [])])
    if status != 0:
        raise RecallError(f"measuring recall failed with status {status}; it has told why")
    found = read(file)
    file.unlink()
    return found


def _status(command: Sequence[str]) -> int:
    with subprocess.Popen(command, stdout=sys.stderr) as process:
        try:
            return process.wait(MEASURED_S)
        except subprocess.TimeoutExpired as error:
            _end(process)
            raise RecallError(f"measuring recall did not end within {MEASURED_S / 3600:.0f} hours") from error
        except BaseException:
            _end(process)
            raise


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()


def read(file: Path) -> dict[str, Any]:
    """The file, if it is one of the program's. Raises RecallError."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecallError(f"{file} cannot be read: {error}") from error
    rows = found.get("rows") if isinstance(found, dict) else None
    if not isinstance(rows, list) or not rows or not all({"predictor", "recall"} <= row.keys() for row in rows):
        raise RecallError(f"{file} has no rows of recall")
    return {"curves": [], **found}


def record_of(found: Mapping[str, Any], *, machine: Machine, command: str) -> Record:
    """The whole of it; the file's other contents are kept as facts."""
    rows: Sequence[Mapping[str, Any]] = found["rows"]
    return Record(
        name="recall",
        title="Recall of the forecasts: experts forecast rightly over experts needed",
        command=command,
        machine=machine,
        columns=[column for column in COLUMNS if any(row.get(column.field) is not None for row in rows)],
        rows=rows,
        facts={name: value for name, value in found.items() if name != "rows"},
        notes=found.get("notes", ()),
    )
