"""When to send a life sign and when to take a peer for lost. Knows no clock and no link: `now` is passed in.

The same arithmetic for busy and idle peers: any message counts as life, in either direction.
"""

from dataclasses import dataclass


@dataclass
class Liveness:
    """One peer, seen from here. Times are seconds of one monotonic clock; `started_s` counts as heard."""

    heartbeat_s: float
    lost_after_s: float
    started_s: float

    def __post_init__(self) -> None:
        if not 0.0 < self.heartbeat_s < self.lost_after_s:
            raise ValueError(f"needs 0 < heartbeat_s < lost_after_s, not {self.heartbeat_s} and {self.lost_after_s}")
        self._heard_s = self._said_s = self.started_s

    def heard(self, now_s: float) -> None:
        """Any message came from the peer."""
        self._heard_s = max(self._heard_s, now_s)

    def excuse(self, late_s: float, now_s: float) -> None:
        """We could not hear anybody for so long; that much of its silence is not the peer's."""
        self._heard_s = min(now_s, self._heard_s + late_s)

    def said(self, now_s: float) -> None:
        """A life sign went to the peer."""
        self._said_s = max(self._said_s, now_s)

    def due(self, now_s: float) -> bool:
        """Whether it is time for a life sign of ours."""
        return now_s >= self._said_s + self.heartbeat_s

    def silence_s(self, now_s: float) -> float:
        """Seconds since anything came from the peer."""
        return now_s - self._heard_s

    def lost(self, now_s: float) -> bool:
        """Whether the peer has been silent for too long."""
        return now_s >= self._heard_s + self.lost_after_s

    def wait_s(self, now_s: float) -> float:
        """Seconds until `due` or `lost` changes, at least 0: how long a driver may sleep on this peer's account."""
        return max(0.0, min(self._said_s + self.heartbeat_s, self._heard_s + self.lost_after_s) - now_s)
