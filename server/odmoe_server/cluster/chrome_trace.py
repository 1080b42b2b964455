"""Rows and slices as events of Chrome's trace format, which Perfetto and chrome://tracing draw. Pure.

Knows the format; knows nothing of experts. Processes and rows (the format's threads) get their numbers and names when
they are first drawn on, in a fixed order of rows where `ROWS` names them.
"""

from dataclasses import dataclass, field
from typing import Any, Final

Event = dict[str, Any]

# Layers have rows of their own, above these or alone; the number says where a row stands.
ROWS: Final = {"step": 0, "load": 1, "wait": 2, "compute": 3, "send": 4}
FIRST_LAYER_ROW: Final = 10
ROWS_A_PROCESS: Final = 10_000


def milliseconds(seconds: float) -> float:
    """For people to read."""
    return round(seconds * 1e3, 3)


@dataclass(kw_only=True)
class Drawing:
    """Collects events until they are taken. `origin_s` is where the drawing's time begins."""

    origin_s: float
    # Names of all processes and rows so far, to begin a further file with.
    names: list[Event] = field(default_factory=list)
    _events: list[Event] = field(default_factory=list)
    _pids: dict[str, int] = field(default_factory=dict)
    _ends_s: dict[int, float] = field(default_factory=dict)  # row -> where its last slice ends

    def take(self) -> list[Event]:
        """The events since the last time."""
        events, self._events = self._events, []
        return events

    def slice(self, process: str, row: str, name: str, began_s: float, ended_s: float, **args: Any) -> None:
        """Something that took a while. Slices of one row never overlap: one that begins before the last one has
        ended is cut, and says by how much."""
        pid, tid = self.row(process, row)
        last_s = self._ends_s[tid]
        if began_s < last_s:
            args["cut_ms"] = milliseconds(min(last_s, ended_s) - began_s)
            began_s = last_s
        ended_s = max(began_s, ended_s)
        self._ends_s[tid] = ended_s
        # Both ends are rounded before the difference is taken, or neighbours would overlap.
        began_ns, ended_ns = self._ns(began_s), self._ns(ended_s)
        shape = {"ts": began_ns / 1e3, "dur": (ended_ns - began_ns) / 1e3}
        self._events.append({"ph": "X", "name": name, "cat": row, "pid": pid, "tid": tid, **shape, "args": args})

    def instant(self, process: str, row: str, name: str, at_s: float) -> None:
        """Something that took no time."""
        pid, tid = self.row(process, row)
        shape = {"ts": self._ns(at_s) / 1e3, "dur": 0, "s": "t"}
        self._events.append({"ph": "i", "name": name, "cat": row, "pid": pid, "tid": tid, **shape, "args": {}})

    def row(self, process: str, row: str) -> tuple[int, int]:
        """Process and thread id of a row, which is named if it is new."""
        if process not in self._pids:
            pid = self._pids[process] = len(self._pids) + 1
            self._name("process", pid, 0, process, order=pid)
        pid = self._pids[process]
        place = ROWS[row] if row in ROWS else FIRST_LAYER_ROW + int(row.removeprefix("layer "))
        tid = pid * ROWS_A_PROCESS + place
        if tid not in self._ends_s:
            self._ends_s[tid] = self.origin_s
            self._name("thread", pid, tid, row, order=place)
        return pid, tid

    def _name(self, what: str, pid: int, tid: int, name: str, *, order: int) -> None:
        shape = {"ph": "M", "pid": pid, "tid": tid, "ts": 0, "dur": 0}
        named = [
            {**shape, "name": f"{what}_name", "args": {"name": name}},
            {**shape, "name": f"{what}_sort_index", "args": {"sort_index": order}},
        ]
        self.names += named
        self._events += named

    def _ns(self, at_s: float) -> int:
        return round((at_s - self.origin_s) * 1e9)
