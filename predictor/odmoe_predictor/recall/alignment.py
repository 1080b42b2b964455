"""When a shadow is aligned in a measurement, and with what. The twin of the server's `engine/align.py`; pure."""

from dataclasses import dataclass
from typing import Literal

# Align every so many steps; None is never again after the first.
Period = int | None
PromptKv = Literal["full", "own"]


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """`prompt_kv` says whose keys and values of the prompt the shadow starts with."""

    token: Period = 1
    kv: Period = 1
    prompt_kv: PromptKv = "full"


def is_due(step: int, period: Period) -> bool:
    """Whether the step aligns what has this period; the first one always does."""
    return step == 0 if period is None else step % period == 0
