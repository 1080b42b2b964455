"""What a viewer of Chrome's trace format needs of a timeline, checked, and its slices as they are drawn."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Slice:
    """One slice, in microseconds, under the names of its process and row."""

    process: str
    row: str
    name: str
    began: float
    ended: float
    args: dict[str, Any]


def slices_of(events: list[dict[str, Any]]) -> list[Slice]:
    """The slices of events that form a valid drawing, in the order of the file."""
    processes = names(events, "process")
    rows = names(events, "thread")
    found: list[Slice] = []
    ends: dict[tuple[int, int], float] = {}
    for event in events:
        assert event["ph"] in ("M", "X", "i"), event
        assert event["ts"] >= 0, event
        assert event["dur"] >= 0, event
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        if event["ph"] == "M":
            continue
        row = (event["pid"], event["tid"])
        if event["ph"] == "X":
            # Slices that are written one after the other and do not overlap need no nesting. Half a nanosecond is
            # what a number of microseconds may be off by.
            assert event["ts"] >= ends.get(row, 0.0) - 0.0005, event
            ends[row] = event["ts"] + event["dur"]
            shape = {"name": event["name"], "began": event["ts"], "ended": ends[row], "args": event["args"]}
            found.append(Slice(process=processes[row[0]], row=rows[row[1]], **shape))
    return found


def names(events: list[dict[str, Any]], what: str) -> dict[int, str]:
    """Number -> name of all processes, or of all threads."""
    key = {"process": "pid", "thread": "tid"}[what]
    return {event[key]: event["args"]["name"] for event in events if event["name"] == f"{what}_name"}


def read(path: Path) -> dict[str, Any]:
    """The whole of a timeline file."""
    document: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return document
