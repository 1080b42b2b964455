"""A benchmark's record: NAME_MACHINE_DATE.md, .json and .png, and what is told of the machine. Knows no benchmark."""

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from rich.table import Table

_GIT_S: Final = 10
_CHECKOUT: Final = Path(__file__).parents[3]
_RESULTS: Final = Path("tests/bench/results")
_NO_NAMES: Final = {"intel", "amd", "r", "tm", "cpu", "processor", "with", "gen", "core", "apple", "core(tm)"}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where it ran."""

    cpu: str
    cores: int
    memory_gb: float
    system: str

    @property
    def slug(self) -> str:
        """A short name for files, such as xeon-2c."""
        words = [word for word in re.findall(r"[a-z0-9]+", self.cpu.lower()) if word not in _NO_NAMES]
        return f"{words[0] if words else 'machine'}-{self.cores}c"


@dataclass(frozen=True)
class Column:
    """A column of the table: a row's field by its name, times `times`, with so many decimals. The terminal has room
    for those that are `brief`."""

    head: str
    field: str
    decimals: int | None = None
    times: float = 1.0
    brief: bool = True

    def text(self, row: Mapping[str, Any]) -> str:
        value = row.get(self.field)
        if value is None:
            return "-"
        if self.decimals is None:
            return {True: "yes", False: "NO"}.get(value, str(value)) if isinstance(value, bool) else str(value)
        return f"{value * self.times:.{self.decimals}f}"


def version_text() -> str:
    """The package's version, and the commit when this is a checkout."""
    described = ["git", "-C", str(_CHECKOUT), "describe", "--always", "--dirty", "--abbrev=12"]
    if not (_CHECKOUT / ".git").exists():
        return version("odmoe")
    try:
        found = subprocess.run(described, capture_output=True, text=True, check=False, timeout=_GIT_S).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        found = ""
    return f"{version('odmoe')} ({found})" if found else version("odmoe")


@dataclass(frozen=True, kw_only=True)
class Record:
    """What is kept. `facts` go into the JSON as they are, `notes` are sentences below the table."""

    name: str
    title: str
    command: str
    machine: Machine
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    when: datetime = field(default_factory=lambda: datetime.now(UTC))
    version: str = field(default_factory=version_text)

    @property
    def stem(self) -> str:
        """The files' name without its ending."""
        return f"{self.name}_{self.machine.slug}_{self.when:%Y-%m-%d}"

    def json(self) -> str:
        """The whole of it."""
        about = {
            "name": self.name,
            "date": self.when.isoformat(timespec="seconds"),
            "machine": {**vars(self.machine), "slug": self.machine.slug},
            "command": self.command,
            "version": self.version,
        }
        whole = {**about, **self.facts, **about, "notes": list(self.notes), "rows": list(self.rows)}
        return json.dumps(whole, indent=1) + "\n"

    def markdown(self, *, picture: str | None) -> str:
        """For people: what, where, how, the table, the notes, the picture."""
        machine = self.machine
        head = [
            f"# {self.title}",
            f"* date: {self.when:%Y-%m-%d %H:%M} UTC\n"
            f"* machine: {machine.cpu}, {machine.cores} cores, {machine.memory_gb:.0f} GB, {machine.system}\n"
            f"* command: `{self.command}`\n"
            f"* version: {self.version}",
            markdown_table(self.columns, self.rows),
        ]
        notes = ["\n".join(f"* {note}" for note in self.notes)] if self.notes else []
        drawn = [f"![{self.title}]({picture})"] if picture else []
        return "\n\n".join([*head, *notes, *drawn]) + "\n"

    def table(self) -> Table:
        """For the terminal."""
        drawn = Table(title=self.title, title_justify="left")
        columns = [column for column in self.columns if column.brief]
        for column in columns:
            is_text = column.decimals is None
            drawn.add_column(column.head, justify="left" if is_text else "right", no_wrap=is_text)
        for row in self.rows:
            drawn.add_row(*(column.text(row) for column in columns))
        return drawn


def markdown_table(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> str:
    """A table whose source is aligned too."""
    texts = [[column.head for column in columns], *([column.text(row) for column in columns] for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*texts, strict=True)]
    lines = []
    for cells in texts:
        padded = [
            cell.ljust(width) if column.decimals is None else cell.rjust(width)
            for cell, width, column in zip(cells, widths, columns, strict=True)
        ]
        lines.append("| " + " | ".join(padded) + " |")
    rule = ["-" * (width - 1) + ("-" if c.decimals is None else ":") for width, c in zip(widths, columns, strict=True)]
    return "\n".join([lines[0], "| " + " | ".join(rule) + " |", *lines[1:]])


def results_directory() -> Path:
    """Where records go unless somebody says otherwise: into the checkout, if this is one, else here."""
    return _CHECKOUT / _RESULTS if (_CHECKOUT / "tests" / "bench").is_dir() else Path.cwd()


def command_text() -> str:
    """The command that runs, as a user would type it."""
    return "odmoe " + shlex.join(sys.argv[1:])


def this_machine() -> Machine:
    """The machine this runs on."""
    return Machine(
        cpu=_cpu(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_gb=_memory_bytes() / 1e9,
        system=f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
    )


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0
