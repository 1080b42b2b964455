"""A forward of the shadow under way: who is told what its routers say, and who does not care any more.

Knows rows and layers; knows neither model nor cache.

Shape suffixes: T token rows, K experts a token, H hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass

from odmoe_model.seam import ExpertsCall
from odmoe_predictor.feedback import Sights

# Called with a layer's ordinal and the experts forecast for it, ascending, as soon as its router has spoken.
OnRouting = Callable[[int, list[int]], None]


class AbandonedError(Exception):
    """Unwinds a forward that nobody waits for any more."""


@dataclass
class Pass:
    """One sequence's: how many rows at the end are forecast, the last of them at `position`; `later` rows come in
    pieces after this one. Where `sights` are kept, what the gates saw is noted there."""

    position: int
    newest: int
    later: int
    on_routing: OnRouting
    is_stale: Callable[[], bool]
    sights: Sights | None = None

    def hear(self, call: ExpertsCall) -> None:
        """A layer's router has spoken. Raises AbandonedError."""
        if self.is_stale():
            raise AbandonedError
        if self.later:
            return
        experts = sorted(set(call.index_TK[-self.newest :].flatten().tolist()))
        self.on_routing(call.layer, experts)
        if self.sights is not None and self.newest == 1:
            self.sights.note(self.position, call.layer, x_1H=call.x_TH[-1:], experts=experts)


@dataclass
class SharedPass:
    """Several sequences' at once, by the row each of them has. One that turned stale is told nothing more and is not in
    `passes` any more; the forward goes on while there is another."""

    passes: dict[int, Pass]

    def hear(self, call: ExpertsCall) -> None:
        """A layer's router has spoken. Raises AbandonedError."""
        self.passes = {row: one for row, one in self.passes.items() if not one.is_stale()}
        if not self.passes:
            raise AbandonedError
        routed: list[list[int]] = call.index_TK.tolist()
        for row, one in self.passes.items():
            experts = sorted(set(routed[row]))
            one.on_routing(call.layer, experts)
            if one.sights is not None:
                one.sights.note(one.position, call.layer, x_1H=call.x_TH[row : row + 1], experts=experts)
