"""How a load that is under way is told to stop, and says that it did. Knows nothing of what is loaded."""

from typing import Protocol


class Stop(Protocol):
    """A flag that another thread may set; `threading.Event` is one."""

    def is_set(self) -> bool: ...

    def wait(self, timeout: float) -> bool:
        """Sleep until the flag is set or `timeout` seconds are over; whether it is set."""
        ...


class BrokenOffError(Exception):
    """The load stopped midway because it was told to; its slot holds nothing."""


def check(stop: Stop | None) -> None:
    """Raises BrokenOffError if the flag is there and set."""
    if stop is not None and stop.is_set():
        raise BrokenOffError


def wait_for(stop: Stop, timeout_s: float) -> bool:
    """Sleep until the flag is set or the time is over; whether it is set."""
    return stop.wait(timeout_s)
