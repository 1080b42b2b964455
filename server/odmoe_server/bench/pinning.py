"""Which core each role gets, so that two cores stand for separate devices. Knows the operating system's affinities."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

# Before the program begins, hence before any of its threads does.
_PIN: Final = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])}); os.execvp(sys.argv[2], sys.argv[2:])"


@dataclass(frozen=True, kw_only=True)
class Cores:
    """`main` is for the resident run, the server and all nodes; `beside` for the predictor and for who asks. None
    leaves a process where the system puts it."""

    main: int | None
    beside: int | None

    @property
    def words(self) -> str:
        """For the record."""
        if self.main is None:
            return "nothing was pinned: this system does not pin processes, or has only one core"
        return f"resident run, server and nodes on core {self.main}, predictor on core {self.beside}; one thread each"


def choose(available: Sequence[int]) -> Cores:
    """Two of the cores this process may use: the last for what is measured, since the first often has the system's
    interrupts."""
    if len(available) < 2:
        return Cores(main=None, beside=None)
    ordered = sorted(available)
    return Cores(main=ordered[-1], beside=ordered[0])


def available() -> list[int]:
    """The cores this process may use; none where the system does not say."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def pinned(command: Sequence[str], core: int | None) -> list[str]:
    """The command, to run on that core only."""
    return list(command) if core is None else [sys.executable, "-c", _PIN, str(core), *command]


def stay_on(core: int | None) -> None:
    """Keep this process on that core from now on."""
    if core is not None:
        os.sched_setaffinity(0, {core})
