"""When the shadow is brought in line with the full model, and with what (OD-MoE section 3.2). Pure: no tensor.

Two things can be aligned, each with a period of its own, counted in decode steps: the token (ours replaces the one
the shadow would have gone on with) and the keys and values of all positions the shadow has not got from us. In a step
whose token is not aligned the shadow goes on with its own next token.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Periods:
    """Align every so many steps; None is never again after the first time, which always brings both."""

    token: int | None = 1
    kv: int | None = 1


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """What one step sends. `start`: the sequence is new to the predictor. `token`: with the step's own tokens, else
    the shadow takes its own. `rows`: so many newest positions' keys and values go along; none with 0."""

    start: bool
    token: bool
    rows: int


@dataclass(kw_only=True)
class Shadowed:
    """What the predictor has of one sequence: which incarnation `by`, our keys and values up `to` which position,
    and how many steps it was told of."""

    by: int | None = None
    to: int = 0
    steps: int = 0

    def align(self, *, predictor: int | None, position: int, num_fresh: int, periods: Periods) -> Alignment | None:
        """What to send before the step that takes `num_fresh` tokens at `position`; None without a predictor and
        for a prompt, which is not forecast: nearly every expert is active. What is returned counts as sent."""
        if predictor is None or position == 0:
            return None
        start = self.by != predictor
        if start:
            self.by, self.to, self.steps = predictor, 0, 0
        # The shadow cannot know by itself that a step takes several tokens.
        token = num_fresh > 1 or _is_due(self.steps, periods.token)
        rows = position - self.to if _is_due(self.steps, periods.kv) else 0
        self.to += rows
        self.steps += 1
        return Alignment(start=start, token=token, rows=rows)


def _is_due(step: int, period: int | None) -> bool:
    return step == 0 if period is None else step % period == 0
