"""The file of a measurement: a row for each predictor and setting, and recall against token index. Knows no model."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic
from typing import Literal

from odmoe_predictor.config import Precision, Scope
from odmoe_predictor.recall.alignment import Alignment, Period, PromptKv
from odmoe_predictor.recall.plan import Predictor, ShadowRun
from odmoe_predictor.recall.tally import Tally

WrittenPeriod = Literal["off"] | int


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table. `recall` as OD-MoE defines it, over all layers; `covered` the share of layers with a
    forecast; `agreement` the share of an answer's tokens that the shadow, too, would have gone on with. `bytes` are
    measured on what is in memory, caches left out. `ms_per_step` is a step of the whole batch, shared by the alignments
    measured together. None where a column says nothing of a predictor."""

    predictor: Predictor
    precision: Precision | None = None
    scope: Scope | None = None
    align_token: WrittenPeriod | None = None
    align_kv: WrittenPeriod | None = None
    prompt_kv: PromptKv | None = None
    run_ahead: int = 0
    layers_ahead: int | None = None
    recall: float
    covered: float = 1.0
    agreement: float | None = None
    tokens: int
    bytes: int
    ms_per_step: float | None = None


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Recall of each token index, and how many answers are that long."""

    label: str
    precision: Precision
    scope: Scope
    align_token: WrittenPeriod
    align_kv: WrittenPeriod
    prompt_kv: PromptKv
    recall: list[float]
    alive: list[int]


@dataclass(kw_only=True)
class Results:
    """Everything measured so far; `write` after each row, so that who interrupts keeps them."""

    path: Path
    model: str
    prompts: int
    tokens_per_prompt: int
    threads: int
    quick: bool
    seed: int
    rows: list[Row] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    began_s: float = field(default_factory=monotonic)

    def write(self) -> None:
        """Replace the file in one go. Raises OSError."""
        whole = asdict(self) | {"seconds": monotonic() - self.began_s}
        del whole["path"], whole["began_s"]
        beside = self.path.with_name(self.path.name + ".part")
        beside.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, self.path)


def shadow_row(run: ShadowRun, alignment: Alignment, tally: Tally, *, held_bytes: int, ms_per_step: float) -> Row:
    """The row of one alignment of a shadow."""
    return Row(
        predictor="shadow",
        precision=run.precision,
        scope=run.scope,
        align_token=written(alignment.token),
        align_kv=written(alignment.kv),
        prompt_kv=alignment.prompt_kv,
        recall=tally.recall,
        agreement=tally.agreement,
        tokens=sum(tally.alive_N),
        bytes=held_bytes,
        ms_per_step=ms_per_step,
    )


def shadow_curve(run: ShadowRun, alignment: Alignment, tally: Tally) -> Curve:
    """Its curve."""
    return Curve(
        label=label(run, alignment),
        precision=run.precision,
        scope=run.scope,
        align_token=written(alignment.token),
        align_kv=written(alignment.kv),
        prompt_kv=alignment.prompt_kv,
        recall=tally.curve,
        alive=tally.alive_N,
    )


def label(run: ShadowRun, alignment: Alignment) -> str:
    """What a plot calls it."""
    names = {
        (1, 1): "aligned every step",
        (1, None): "token only",
        (None, 1): "KV only",
        (None, None): "not aligned",
    }
    periods = f"token {written(alignment.token)}, KV {written(alignment.kv)}"
    text = f"{run.precision} {run.scope}, {names.get((alignment.token, alignment.kv), periods)}"
    return text if alignment.prompt_kv == "full" else f"{text}, own prompt"


def written(period: Period) -> WrittenPeriod:
    """A period as the file has it."""
    return "off" if period is None else period
