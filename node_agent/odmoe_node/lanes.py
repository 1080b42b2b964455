"""Where slow work runs: a thread of its own, or the caller's. Knows nothing of what the work is.

A lane takes jobs in order and puts the event each of them ends with into the inbox.
"""

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from odmoe_node.events import Event, LoadDone
from odmoe_wire.waiting import Wake

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Job:
    """`run` gives the event of success; whatever it raises becomes the event that `broke` makes of the
    reason."""

    run: Callable[[], Event]
    broke: Callable[[str], Event]

    def event(self) -> Event:
        """Do the job; there is always an event, or the slot it is about would be busy for ever."""
        try:
            return self.run()
        except Exception as error:  # the outermost frame of a job: it becomes an answer to whoever asked
            log.exception("a job failed")
            return self.broke(f"{type(error).__name__}: {error}"[:500])


class Inbox:
    """Events of jobs that ended, from any thread; `wake` is set with each. While `loads_can_wait`, the end of a load
    stays here until something else wakes the loop: waking a thread costs more than all it has to do then."""

    def __init__(self, wake: Wake) -> None:
        self.loads_can_wait = False
        self._wake = wake
        self._events: deque[Event] = deque()

    def put(self, event: Event) -> None:
        self._events.append(event)
        if not (self.loads_can_wait and isinstance(event, LoadDone)):
            self._wake.set()

    def let_loads_wait(self, can_wait: bool) -> None:
        """Before the loop sleeps. An event put in just before this is not missed."""
        self.loads_can_wait = can_wait
        if self._events and not can_wait:
            self._wake.set()

    def take(self) -> Event | None:
        return self._events.popleft() if self._events else None


class Lane(Protocol):
    """Does jobs one after the other."""

    def submit(self, job: Job) -> None: ...

    def stop(self, *, timeout_s: float) -> bool:
        """Take no more jobs and let the present one end; false if it did not in time."""
        ...


class InlineLane:
    """Does a job on the spot: for tests, and for work shorter than the way to another thread and back."""

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox

    def submit(self, job: Job) -> None:
        self._inbox.put(job.event())

    def stop(self, *, timeout_s: float) -> bool:
        return True


class ThreadLane:
    """Does jobs on a thread of its own; `prepare` is called there first."""

    def __init__(self, inbox: Inbox, *, name: str, prepare: Callable[[], None]) -> None:
        self._inbox = inbox
        self._prepare = prepare
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        self._jobs.put(job)

    def stop(self, *, timeout_s: float) -> bool:
        self._jobs.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        self._prepare()
        while (job := self._jobs.get()) is not None:
            self._inbox.put(job.event())
