"""The roles' processes: started, killed, paused. Real processes, forked from one that has imported what is slow.

A fork server saves each start the seconds of importing torch; nothing else is shared, and a role begins as its command
does. All of them end with that server, and it with us.
"""

import asyncio
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Final

MAINS: Final = {"server": "odmoe_server.cli", "node": "odmoe_node.__main__", "predictor": "odmoe_predictor.__main__"}
_PRELOAD: Final = [
    *MAINS.values(),
    "odmoe_server.launch",
    "odmoe_server.serving",
    "odmoe_predictor.process",
    "transformers.models.mixtral.modeling_mixtral",
]
_END_S = 30.0
_LOOK_S: Final = 0.02
_WELCOMED: Final = b"connected to the server"  # as nodes and predictor log it

_context = multiprocessing.get_context("forkserver")


def begin() -> None:
    """Say what every role needs; before the first one starts."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _context.set_forkserver_preload(list(_PRELOAD))


def _run(role: str, argv: Sequence[str], log: str) -> None:
    """In the new process."""
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    sys.argv = [f"odmoe-{role}", *argv]
    sys.exit(import_module(MAINS[role]).main())


@dataclass
class Process:
    """One role of one campaign through all its lives."""

    name: str
    role: str
    argv: Sequence[str]
    log: Path
    lives: int = 0
    is_away: bool = False  # it is to end, or has, and will be back
    _now: BaseProcess | None = None
    _log_began_bytes: int = 0  # where the present life's part of the log begins

    @property
    def pid(self) -> int:
        """Of the present life."""
        assert self._now is not None
        assert self._now.pid is not None
        return self._now.pid

    @property
    def is_alive(self) -> bool:
        """Whether it runs; a paused one does."""
        return self._now is not None and self._now.is_alive()

    @property
    def exit_code(self) -> int | None:
        """Of the present life, once it is over."""
        return None if self._now is None else self._now.exitcode

    def start(self) -> None:
        """Begin a new life."""
        self.lives += 1
        self.is_away = False
        self._log_began_bytes = self.log.stat().st_size if self.log.exists() else 0
        self._now = _context.Process(target=_run, args=(self.role, list(self.argv), str(self.log)), daemon=True)
        self._now.start()

    @property
    def has_joined(self) -> bool:
        """Whether this life was welcomed, and so has put its signal handlers in place. The server may not have noticed
        yet that the former one is over."""
        return _WELCOMED in self.log.read_bytes()[self._log_began_bytes :] if self.log.exists() else False

    def send(self, sign: signal.Signals) -> None:
        """A signal, unless it has ended already."""
        if self.is_alive:
            with suppress(ProcessLookupError):
                os.kill(self.pid, sign)

    async def ended(self) -> None:
        """Until it has. On the loop's own thread: multiprocessing reads an exit status once, from a pipe, and of two
        threads that look at the same time one makes 255 of it. Raises TimeoutError."""
        until_s = time.monotonic() + _END_S
        while self.is_alive:
            self._not_after(until_s)
            await asyncio.sleep(_LOOK_S)

    def join(self) -> None:
        """Wait until it has ended; nothing else goes on meanwhile. Raises TimeoutError."""
        until_s = time.monotonic() + _END_S
        while self.is_alive:
            self._not_after(until_s)
            time.sleep(_LOOK_S)

    def _not_after(self, until_s: float) -> None:
        if time.monotonic() > until_s:
            raise TimeoutError(f"{self.name} does not end; its log is {self.log}")

    def resident_bytes(self) -> int:
        """As the kernel counts it."""
        pages = Path(f"/proc/{self.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")


@dataclass
class Processes:
    """All of them, by name."""

    of: dict[str, Process] = field(default_factory=dict)

    def add(self, name: str, role: str, options: Mapping[str, object], *, log: Path) -> Process:
        """A role that is not started yet; `options` as its flags."""
        argv = ["server"] if role == "server" else []
        argv += [f"--{flag}={value}" for flag, value in options.items()]
        self.of[name] = Process(name, role, [*argv, "--exit-with-parent", "--log-level=info"], log)
        return self.of[name]

    def kill_all(self) -> None:
        """Leave nothing behind."""
        for process in self.of.values():
            process.send(signal.SIGKILL)
        for process in self.of.values():
            process.join()
