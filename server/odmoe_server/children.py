"""Child processes that are kept alive and never outlive this one. Knows processes and time; no roles, no models.

What is to be done is decided in `Supervisor.tick` from what the processes say; the clock comes in as an argument.
"""

import logging
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Protocol

log = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.5
MAX_BACKOFF_S = 30.0
# A child that lived this long is not counted as one that fails at its start.
SETTLED_S = 60.0
MAX_FAILURES = 5
EXIT_USAGE = 2
KILL_AFTER_S = 10.0
_NAP_S = 0.02

Forward = Callable[[str, str], None]


@dataclass(frozen=True, kw_only=True)
class ChildSpec:
    """How to start one child. `stop_s` is how long it may take to end when it is asked to."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    pass_fds: Sequence[int] = ()
    stops_first: bool = False
    stop_s: float = KILL_AFTER_S


class Process(Protocol):
    """What is needed of subprocess.Popen."""

    def poll(self) -> int | None:
        """The exit status, None while it runs."""
        ...

    def send_signal(self, sig: int) -> None:
        """Unless it has ended."""
        ...


@dataclass(kw_only=True)
class _Child:
    spec: ChildSpec
    process: Process | None = None
    started_s: float = 0.0
    due_s: float = 0.0
    failures: int = 0

    @property
    def given_up(self) -> bool:
        return self.failures >= MAX_FAILURES


@dataclass(kw_only=True)
class Supervisor:
    """Starts children in order, starts those that die again, ends all of them in order."""

    specs: Sequence[ChildSpec]
    spawn: Callable[[ChildSpec], Process]
    on_death: Callable[[str], None] = lambda name: None
    children: list[_Child] = field(init=False)

    def __post_init__(self) -> None:
        self.children = [_Child(spec=spec) for spec in self.specs]

    def tick(self, now_s: float) -> None:
        """Notice deaths, and start whoever is due."""
        for child in self.children:
            if child.process is not None and (status := child.process.poll()) is not None:
                self._bury(child, status, now_s)
            if child.process is None and not child.given_up and now_s >= child.due_s:
                child.process = self.spawn(child.spec)
                child.started_s = now_s

    def given_up(self) -> list[str]:
        """Names of those that failed too often to be started again."""
        return [child.spec.name for child in self.children if child.given_up]

    def stop(
        self,
        *,
        hurry: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
        nap: Callable[[float], None] = time.sleep,
    ) -> None:
        """End those that go first, then the others together. Who takes longer than it may is killed; all are when
        there is a `hurry`."""
        for first in (True, False):
            group = [c for c in self.children if c.process is not None and c.spec.stops_first == first]
            for child in group:
                _signal(child, signal.SIGTERM)
            deadline_s = clock() + max((child.spec.stop_s for child in group), default=0.0)
            while any(map(_runs, group)) and clock() < deadline_s and not hurry():
                nap(_NAP_S)
            for child in filter(_runs, group):
                log.warning("%s does not end; killing it", child.spec.name)
                _signal(child, signal.SIGKILL)
            deadline_s = clock() + KILL_AFTER_S
            while any(map(_runs, group)) and clock() < deadline_s:
                nap(_NAP_S)

    def _bury(self, child: _Child, status: int, now_s: float) -> None:
        child.process = None
        self.on_death(child.spec.name)
        settled = now_s - child.started_s >= SETTLED_S
        child.failures = 1 if settled else child.failures + 1
        if status == EXIT_USAGE:
            child.failures = MAX_FAILURES  # it would be told the same again
        wait_s = min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2 ** (child.failures - 1))
        child.due_s = now_s + wait_s
        name = child.spec.name
        if child.given_up:
            log.error("%s ended with %s; giving up on it", name, how(status))
        else:
            log.warning("%s ended with %s; starting it again in %.1f s", name, how(status), wait_s)


def _runs(child: _Child) -> bool:
    return child.process is not None and child.process.poll() is None


def _signal(child: _Child, sign: signal.Signals) -> None:
    assert child.process is not None
    child.process.send_signal(sign)


def how(status: int) -> str:
    """An exit status in words."""
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"


def spawn_with(forward: Forward) -> Callable[[ChildSpec], Process]:
    """A way to start children whose output goes to `forward(name, line)`, from a thread for each."""

    def spawn(spec: ChildSpec) -> Process:
        process = subprocess.Popen(
            spec.command,
            env=dict(spec.environment),
            pass_fds=spec.pass_fds,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # Ctrl-C goes to a terminal's whole group; who ends when is decided here.
            start_new_session=True,
        )
        assert process.stdout is not None
        threading.Thread(target=_pump, args=(process.stdout, spec.name, forward), daemon=True).start()
        return process

    return spawn


def _pump(lines: IO[bytes], name: str, forward: Forward) -> None:
    with lines:
        for line in lines:
            forward(name, line.decode(errors="replace").rstrip())
