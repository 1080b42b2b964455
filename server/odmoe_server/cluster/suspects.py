"""Nodes that get no new work for a while, because an answer of theirs was late or nothing is heard of them. Pure.

A node stands still long before it is given up, and a slow one is never given up: without this, every layer would wait
for it anew. The time away doubles with each late answer and ends with one in time. Where nobody else is left, suspects
work as everyone does.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from odmoe_wire.messages import Member

MOST_AWAY_S: Final = 8.0


@dataclass(kw_only=True)
class Suspects:
    """`first_away_s` is what the first late answer costs."""

    first_away_s: float
    late_total: int = 0
    _away_s: dict[str, float] = field(default_factory=dict)
    _until_s: dict[str, float] = field(default_factory=dict)
    _silent: frozenset[str] = frozenset()

    def was_late(self, node_id: str, now: float) -> None:
        """An answer of it did not come in time."""
        if now < self._until_s.get(node_id, now):
            return  # it is away already: this was asked before
        away_s = self._away_s[node_id] = min(MOST_AWAY_S, 2.0 * self._away_s.get(node_id, self.first_away_s / 2.0))
        self._until_s[node_id] = now + away_s
        self.late_total += 1

    def was_in_time(self, node_id: str) -> None:
        """An answer of it came in time."""
        self._away_s.pop(node_id, None)
        self._until_s.pop(node_id, None)

    def are_silent(self, node_ids: Iterable[str]) -> None:
        """Nothing is heard of these, and something is of all others."""
        self._silent = frozenset(node_ids)

    def is_silent(self, node_id: str) -> bool:
        """Whether nothing is heard of it."""
        return node_id in self._silent

    def forget(self, node_id: str) -> None:
        """It left; should it return, it begins anew."""
        self.was_in_time(node_id)

    def among(self, members: Iterable[Member], now: float) -> frozenset[str]:
        """The suspects of these members."""
        return frozenset(
            m.node_id for m in members if m.node_id in self._silent or now < self._until_s.get(m.node_id, 0)
        )

    def spared(
        self, assigned: Mapping[int, str], members: Sequence[Member], *, group: Sequence[Member], now: float
    ) -> dict[int, str]:
        """Expert -> node, with what was meant for suspects given to who has the least to do: of the layer's `group` if
        anybody of it is left, else of all."""
        suspects = self.among(members, now)
        trusted = [m.node_id for m in group if m.node_id not in suspects] or [
            m.node_id for m in members if m.node_id not in suspects
        ]
        if not suspects or not trusted:
            return dict(assigned)
        kept = {expert: node_id for expert, node_id in assigned.items() if node_id not in suspects}
        work = {node_id: list(kept.values()).count(node_id) for node_id in trusted}
        for expert in sorted(assigned.keys() - kept.keys()):
            kept[expert] = min(work, key=lambda node_id: work[node_id])
            work[kept[expert]] += 1
        return kept
