"""Running counts of what experts cost, of one generation or of all. Pure."""

from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass

from odmoe_server.engine_api import ExpertStats
from odmoe_wire.messages import ExpertTiming


@dataclass(kw_only=True)
class Tally:
    """Running counts behind `ExpertStats`."""

    activations: int = 0
    predicted: int = 0
    hit: int = 0
    late: int = 0
    missed: int = 0
    wait_s: float = 0.0
    stall_s: float = 0.0
    drafted: int = 0
    accepted: int = 0
    substituted: int = 0
    loaded_bytes: int = 0

    def add(
        self,
        experts: Collection[int],
        *,
        predicted: Collection[int],
        timings: Iterable[ExpertTiming],
        expert_bytes: int = 0,
    ) -> None:
        """Count one layer of one step that needed these experts, of so many bytes each; timings of others do not
        count."""
        self.activations += len(experts)
        self.predicted += sum(expert in predicted for expert in experts)
        stall_s = 0.0
        for timing in timings:
            if timing.expert in experts:
                self.hit += timing.outcome == "hit"
                self.late += timing.outcome == "late"
                self.missed += timing.outcome == "miss"
                self.loaded_bytes += expert_bytes * timing.fresh
                self.wait_s += timing.wait_s
                stall_s = max(stall_s, timing.wait_s)
        self.stall_s += stall_s

    def stats(self) -> ExpertStats:
        """A snapshot."""
        return ExpertStats(**asdict(self))
