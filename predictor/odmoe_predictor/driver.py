"""A predictor at work: the switchboard on a thread of its own, the forecasts on the caller's. Decides nothing itself.

`run` is the whole life of the process but for its signals; `pump` does all that waits once, for tests without
threads, in which time is passed in.
"""

import logging
import threading
from collections.abc import Callable
from time import monotonic
from typing import Final

import msgspec

from odmoe_predictor.mailbox import Mailbox
from odmoe_predictor.rival_worker import MAX_SEQUENCES, RivalWorker
from odmoe_predictor.rivals.base import Rival
from odmoe_predictor.shadow import Shadow
from odmoe_predictor.switchboard import RefusedError, Switchboard
from odmoe_predictor.worker import Worker
from odmoe_wire.link import Link
from odmoe_wire.messages import Hello, Wants
from odmoe_wire.waiting import Wake, wait

log = logging.getLogger(__name__)

IDLE_S: Final = 1.0  # how long that thread sleeps at most before it looks whether it should stop
FAREWELL_S: Final = 0.1  # for the last messages to get out of the process
JOIN_S: Final = 5.0


class Predictor:
    """`hello` says who we are; the links are ours to close once `run` was called. A shadow may forecast `run_ahead`
    tokens beyond the newest the server has sent; of a rival, which has no tokens of its own, `max_sequences` are
    remembered."""

    def __init__(
        self,
        hello: Hello,
        forecaster: Shadow | Rival,
        *,
        server: Link,
        nodes: Link,
        num_layers: int,
        run_ahead: int = 0,
        max_sequences: int = MAX_SEQUENCES,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._clock = clock
        self._links = [server, nodes]
        self._wake = Wake()
        self._mailbox = Mailbox(self._wake)
        hello = msgspec.structs.replace(hello, wants=_wants(forecaster))
        self.switchboard = Switchboard(
            hello, server=server, nodes=nodes, mailbox=self._mailbox, num_layers=num_layers, now=clock()
        )
        self.worker: Worker | RivalWorker
        if isinstance(forecaster, Shadow):
            self.worker = Worker(forecaster, self._mailbox, run_ahead=run_ahead, clock=clock)
        else:
            self.worker = RivalWorker(forecaster, self._mailbox, max_sequences=max_sequences)
        self._stopping = threading.Event()
        self._refused: RefusedError | None = None

    def pump(self, now: float) -> bool:
        """Do all that waits; true if there was anything. Raises RefusedError."""
        busy = self.switchboard.pump(now)
        busy = self.worker.work() or busy
        return self.switchboard.send_forecasts() or busy

    def run(self) -> None:
        """Until `stop`, or until an exception such as KeyboardInterrupt ends the caller's thread; then say goodbye
        and close the links. Raises RefusedError when the server does not want us."""
        sockets = threading.Thread(target=self._run_sockets, name="predictor-links", daemon=True)
        sockets.start()
        try:
            while not self._stopping.is_set():
                self._mailbox.wait(timeout_s=IDLE_S)
                self.worker.work()
        finally:
            self.stop()
            sockets.join(JOIN_S)
            self._wake.close()
            log.info("%s", self.worker.counters)
        if self._refused is not None:
            raise self._refused

    def stop(self) -> None:
        """Make `run` end within `IDLE_S`; from any thread, not from a signal handler."""
        self._stopping.set()
        self._wake.set()

    def _run_sockets(self) -> None:
        try:
            while not self._stopping.is_set():
                self._turn()
        except RefusedError as error:
            self._refused = error
            self.stop()
        finally:
            self.switchboard.leave("the predictor was told to stop")
            self._wake.clear()
            wait([], self._wake, timeout_s=FAREWELL_S)
            for link in self._links:
                link.close()

    def _turn(self) -> None:
        try:
            wait(self._links, self._wake, timeout_s=self.switchboard.wait_s(self._clock()))
            self._wake.clear()
            self.switchboard.pump(self._clock())
        except RefusedError:
            raise
        except Exception:  # outermost loop: one bad event must not end the predictor
            self.switchboard.counters.loop_errors += 1
            log.exception("the predictor failed on an event")


def _wants(forecaster: Shadow | Rival) -> Wants:
    if isinstance(forecaster, Shadow):
        return "cache+inputs" if forecaster.corrects else "cache"
    return forecaster.wants
