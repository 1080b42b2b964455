"""When the shadow is brought in line with the full model, and with what (OD-MoE section 3.2). Pure: no tensor.

Two things can be aligned, each with a period of its own, counted in decode steps: the token (ours replaces the one
the shadow would have gone on with) and the keys and values of all positions the shadow has not got from us. In a step
whose token is not aligned the shadow goes on with its own next token. A prompt is not forecast, since nearly every
expert is active; the shadow gets its keys and values with the first decode step, or its tokens when it begins.

A predictor that is no shadow is told every decode step's token and, layer by layer, what the gates chose. A shadow may
want to hear that too, to correct its forecasts.
"""

from dataclasses import dataclass
from typing import Literal

from odmoe_wire.messages import Wants

# The prompt's keys and values in the shadow's cache: the full model's, or the shadow's own.
PromptKV = Literal["full", "own"]


@dataclass(frozen=True, kw_only=True)
class Periods:
    """Align every so many steps; None is never again after the first time, which always brings both. `prompt`: whose
    keys and values of the prompt the shadow works with."""

    token: int | None = 1
    kv: int | None = 1
    prompt: PromptKV = "full"


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """What one step sends. `start`: the sequence is new to the predictor. `token`: with the step's own tokens (when a
    prompt begins, all of it), else the shadow takes its own. `rows`: so many newest positions' keys and values go
    along; none with 0. `wants`: what else the predictor is told while the step runs; with "cache" nothing."""

    start: bool
    token: bool
    rows: int
    wants: Wants = "cache"


@dataclass(kw_only=True)
class Shadowed:
    """What the predictor has of one sequence: which incarnation `by`, our keys and values up `to` which position,
    and how many steps it was told of."""

    by: int | None = None
    to: int = 0
    steps: int = 0

    def align(
        self,
        *,
        predictor: int | None,
        wants: Wants = "cache",
        position: int,
        num_fresh: int,
        num_prompt: int,
        periods: Periods,
    ) -> Alignment | None:
        """What to send before the step that takes `num_fresh` tokens at `position`, after a prompt of `num_prompt`;
        None when there is nothing to send. What is returned counts as sent."""
        if predictor is None:
            return None
        if position < num_prompt:
            own = position == 0 and periods.prompt == "own" and _is_shadow(wants)
            return self._prompt(predictor, num_prompt) if own else None
        start = self.by != predictor
        if start:
            self.by, self.to, self.steps = predictor, 0, 0
        if not _is_shadow(wants):
            return Alignment(start=start, token=True, rows=0, wants=wants)
        # The shadow cannot know by itself that a step takes several tokens.
        token = num_fresh > 1 or _is_due(self.steps, periods.token)
        rows = position - self.to if _is_due(self.steps, periods.kv) else 0
        self.to += rows
        self.steps += 1
        return Alignment(start=start, token=token, rows=rows, wants=wants)

    def _prompt(self, predictor: int, num_prompt: int) -> Alignment:
        """The shadow is to compute the prompt's keys and values itself, all of them at once: the chunks in which the
        full model takes it are of no use to the shadow."""
        self.by, self.to, self.steps = predictor, num_prompt, 0
        return Alignment(start=True, token=True, rows=0)


def _is_shadow(wants: Wants) -> bool:
    return wants in ("cache", "cache+inputs")


def _is_due(step: int, period: int | None) -> bool:
    return step == 0 if period is None else step % period == 0
