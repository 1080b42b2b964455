"""What is measured: which shadows with which alignments, which rivals how far ahead. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

from odmoe_predictor.config import Precision, Scope
from odmoe_predictor.recall.alignment import Alignment

Predictor = Literal["shadow", "random", "frequency", "previous", "gate", "trained"]
PREDICTORS: Final[tuple[Predictor, ...]] = get_args(Predictor)
# Those that need not be told the layer before, and those that look from one layer to a later one.
_BLIND: Final[tuple[Predictor, ...]] = ("random", "frequency", "previous")
_SEEING: Final[tuple[Predictor, ...]] = ("gate", "trained")
LAYERS_AHEAD: Final = (1, 2, 3, 4, 8)
QUICK_LAYERS_AHEAD: Final = (1, 4)
_ORDER: Final[tuple[Precision, ...]] = ("int8", "fp16", "nf4", "int4")
# How many alignments of one shadow go through it in one batch; each needs a cache of its own.
TOGETHER: Final = 6

_EVERY_STEP: Final = Alignment()
_LESS: Final = (Alignment(kv=None), Alignment(token=None), Alignment(token=None, kv=None))
_PERIODS: Final = (
    *(Alignment(kv=period) for period in (2, 4, 8, 16)),
    *(Alignment(token=period) for period in (2, 4, 8, 16)),
    *(Alignment(token=period, kv=period) for period in (2, 4, 8, 16)),
)
_OWN_PROMPT: Final = Alignment(prompt_kv="own")


@dataclass(frozen=True, kw_only=True)
class ShadowRun:
    """A shadow to load, and the alignments to measure it with."""

    precision: Precision
    scope: Scope
    alignments: tuple[Alignment, ...]


@dataclass(frozen=True, kw_only=True)
class RivalRun:
    """A rival; those that do not look from layer to layer have no `layers_ahead`."""

    predictor: Predictor
    layers_ahead: int | None = None


def shadow_runs(*, quick: bool, precisions: Sequence[Precision], scopes: Sequence[Scope]) -> Iterator[ShadowRun]:
    """The most telling first, so that an interrupted measurement is worth something."""
    for precision in _ORDER:
        for scope in get_args(Scope):
            if precision in precisions and scope in scopes and not (quick and scope == "experts"):
                yield ShadowRun(precision=precision, scope=scope, alignments=_alignments(precision, scope, quick=quick))


def batches(run: ShadowRun) -> list[tuple[Alignment, ...]]:
    """The run's alignments, as they go together."""
    return [run.alignments[first : first + TOGETHER] for first in range(0, len(run.alignments), TOGETHER)]


def rival_runs(*, quick: bool, predictors: Sequence[Predictor], num_layers: int) -> list[RivalRun]:
    """The rivals among the predictors; no further ahead than the model has layers."""
    far = [ahead for ahead in (QUICK_LAYERS_AHEAD if quick else LAYERS_AHEAD) if ahead < num_layers]
    blind = [RivalRun(predictor=name) for name in _BLIND if name in predictors]
    seeing = [RivalRun(predictor=name, layers_ahead=ahead) for name in _SEEING if name in predictors for ahead in far]
    return [*blind, *seeing]


def _alignments(precision: Precision, scope: Scope, *, quick: bool) -> tuple[Alignment, ...]:
    if scope == "experts" or precision in ("fp16", "int4") or (quick and precision == "nf4"):
        return (_EVERY_STEP,)
    if precision == "nf4" or quick:
        return (_EVERY_STEP, *_LESS)
    return (_EVERY_STEP, *_LESS, *_PERIODS, _OWN_PROMPT)
