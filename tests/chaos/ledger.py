"""What happened in a campaign, and what it comes to: faults, tokens, requests. Pure; times are passed in.

Recovery after a fault is the longest time without a token on any stream, of those silences that touch the fault. Faults
may overlap, and then share a silence: the figure is an upper bound of what each of them cost.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, Final, Literal

from chaos.faults import Fault

# A silence that begins this long after a fault is over is no longer its doing.
AFTERMATH_S: Final = 1.0
# A request that met a fault of the server itself within this time may end with it.
SERVER_AFTERMATH_S: Final = 6.0

Outcome = Literal["right", "wrong", "failed", "refused"]


@dataclass(frozen=True, kw_only=True)
class Happened:
    """A fault from its first to its last moment."""

    fault: Fault
    began_s: float
    ended_s: float


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request. `refused`: not admitted (503, or nobody listened), so the client tried again."""

    began_s: float
    ended_s: float
    outcome: Outcome
    detail: str = ""


@dataclass(kw_only=True)
class Ledger:
    """Filled while the campaign runs."""

    happened: list[Happened] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)
    # (when, which life of the server, bytes)
    server_memory: list[tuple[float, int, int]] = field(default_factory=list)

    def recovery_s(self, happened: Happened) -> float:
        """See the module. For the server's own process, which nothing can stand in for, from the fault's end on."""
        gone = happened.fault.role == "server" and happened.fault.kind not in ("delay", "drop", "duplicate")
        from_s = happened.ended_s if gone else happened.began_s
        until_s = happened.ended_s + AFTERMATH_S
        # The next fault of the server, which happens alone, has its own silence.
        next_alone_s = min((h.began_s for h in self.happened if h.fault.is_alone and h.began_s > from_s), default=inf)
        longest_s = 0.0
        for before_s, after_s in zip(self.token_s, self.token_s[1:], strict=False):
            if after_s >= from_s and before_s <= until_s and after_s < next_alone_s:
                longest_s = max(longest_s, after_s - max(before_s, from_s if gone else before_s))
        return longest_s

    def silences(self, *, longer_than_s: float) -> list[dict[str, Any]]:
        """Times without a token on any stream: when, how long, and what went on."""
        origin_s = self.token_s[0] if self.token_s else 0.0
        return [
            {
                "at_s": round(before_s - origin_s, 2),
                "silence_s": round(after_s - before_s, 3),
                "faults": [
                    f"{h.fault.number} {h.fault.kind} {h.fault.target} "
                    f"{h.began_s - before_s:+.2f}..{h.ended_s - before_s:+.2f}"
                    for h in self.happened
                    if h.began_s <= after_s and before_s <= h.ended_s + AFTERMATH_S
                ],
            }
            for before_s, after_s in zip(self.token_s, self.token_s[1:], strict=False)
            if after_s - before_s > longer_than_s
        ]

    def longest_silence_without_fault_s(self) -> float:
        """What the machine itself costs: no recovery can be told from less."""
        return max((s["silence_s"] for s in self.silences(longer_than_s=0.0) if not s["faults"]), default=0.0)

    def met_server_fault(self, asked: Asked) -> bool:
        """Whether the server itself was killed, paused or cut off while the request was under way."""
        return any(
            h.fault.role == "server" and h.began_s <= asked.ended_s and asked.began_s <= h.ended_s + SERVER_AFTERMATH_S
            for h in self.happened
        )

    def failed(self) -> list[Asked]:
        """Admitted requests that got no whole answer though the server was there."""
        return [asked for asked in self.asked if asked.outcome == "failed" and not self.met_server_fault(asked)]

    def summary(self) -> dict[str, Any]:
        """The figures of the whole campaign. Recovery is that of faults of workers and links."""
        outcomes = Counter(asked.outcome for asked in self.asked)
        failed = len(self.failed())
        workers = [self.recovery_s(h) for h in self.happened if not h.fault.is_alone]
        servers = [self.recovery_s(h) for h in self.happened if h.fault.is_alone]
        return {
            "faults": len(self.happened),
            "requests": outcomes.total() - outcomes["refused"],
            "failed_requests": failed,
            "wrong_answers": outcomes["wrong"],
            "recovery_s_p50": percentile(workers, 50),
            "recovery_s_p99": percentile(workers, 99),
            "right_answers": outcomes["right"],
            "ended_with_the_server": outcomes["failed"] - failed,
            "refused_and_tried_again": outcomes["refused"],
            "tokens": len(self.token_s),
            "server_recovery_s_p50": percentile(servers, 50),
            "server_recovery_s_p99": percentile(servers, 99),
            "longest_silence_without_fault_s": self.longest_silence_without_fault_s(),
            **self.memory(),
        }

    def memory(self) -> dict[str, float]:
        """Of the server's longest life: megabytes in its first and last quarters, once it has warmed up."""
        lives = Counter(life for _, life, _ in self.server_memory)
        if not lives:
            return {}
        longest = lives.most_common(1)[0][0]
        sizes = [size for _, life, size in self.server_memory if life == longest]
        quarter = max(1, len(sizes) // 4)
        first, last = sizes[quarter : 2 * quarter] or sizes[-1:], sizes[-quarter:]
        return {
            "server_mb_early": round(sum(first) / len(first) / 1e6, 1),
            "server_mb_late": round(sum(last) / len(last) / 1e6, 1),
            "server_mb_most": round(max(sizes) / 1e6, 1),
        }

    def rows(self) -> list[dict[str, Any]]:
        """A line for each role and kind of fault."""
        groups: dict[tuple[str, str], list[Happened]] = {}
        for h in self.happened:
            groups.setdefault((h.fault.role, h.fault.kind), []).append(h)
        return [
            {
                "role": role,
                "kind": kind,
                "faults": len(group),
                "hold_s": sum(h.ended_s - h.began_s for h in group) / len(group),
                "recovery_s_p50": percentile([self.recovery_s(h) for h in group], 50),
                "recovery_s_most": max(self.recovery_s(h) for h in group),
            }
            for (role, kind), group in sorted(groups.items())
        ]


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The smallest value that so many percent of all do not exceed; None of nothing."""
    if not values:
        return None
    rank = max(0, -(-len(values) * percent // 100) - 1)
    return round(sorted(values)[int(rank)], 3)
