"""`odmoe tune-alpha`: times a few alphas on the very server that is asked for, and judges what the chosen one costs.

The server is started as `odmoe serve` would start it. Quality is measured in one process, with as many slots.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Self

import msgspec
from pydantic import Field, field_validator, model_validator
from pydantic_settings import SettingsConfigDict
from rich.console import Console
from rich.table import Table

from odmoe_model.manifest import Manifest, read_manifest
from odmoe_server import launch
from odmoe_server.bench.cluster import running
from odmoe_server.bench.importance import served
from odmoe_server.bench.importance.arms import IMPORTANCE
from odmoe_server.bench.importance.measure import HOST_RATIO, LOAD_RATIO, replay_job
from odmoe_server.bench.importance.replay import Job
from odmoe_server.bench.importance.rows import Row
from odmoe_server.bench.importance.tuning import Curve, Point, fit, smallest
from odmoe_server.bench.pinning import Cores
from odmoe_server.config import ServeSettings


class TuneSettings(ServeSettings):
    """Time some alphas on a server with these settings, and propose the smallest that meets --tpot, with what it costs.

    Every option of odmoe serve means what it means there.
    """

    model_config = SettingsConfigDict(env_prefix="ODMOE_TUNE_ALPHA_")

    tpot: float = Field(gt=0, description="milliseconds a token may take")
    alphas: tuple[float, ...] = Field((0.0, 0.2, 0.4, 0.6), description="alphas to time, comma separated; two at least")
    batch: int = Field(1, ge=1, le=16, description="requests at a time")

    @field_validator("alphas", mode="before")
    @classmethod
    def _between_commas(cls, alphas: object) -> object:
        if isinstance(alphas, str):
            alphas = [alphas]
        if isinstance(alphas, list):
            return [part.strip() for text in alphas for part in str(text).split(",") if part.strip()]
        return alphas

    @model_validator(mode="after")
    def _can_be_tuned(self) -> Self:
        if self.mode != IMPORTANCE:
            raise ValueError("alpha means something in importance mode only: add --mode importance")
        if len(set(self.alphas)) < 2:
            raise ValueError("--alphas: a curve needs two alphas at least")
        most = 1.0 if self.max_alpha is None else self.max_alpha
        if min(self.alphas) < 0 or max(self.alphas) > most:
            raise ValueError(f"--alphas are from 0 to --max-alpha, {most:g}")
        return self


TOKENS: Final = 32
JUDGED_TOKENS: Final = 48
JUDGED_TEXTS: Final = 3


class Proposal(msgspec.Struct, frozen=True, kw_only=True):
    """The alpha, the points it was found by, what the fit says a token takes at it, and what it costs."""

    alpha: float
    tpot_ms: float
    points: dict[float, float]
    slots_share: float
    batch: int
    hit_rate: float
    perplexity: float
    perplexity_vs_gated: float
    perplexity_low: float
    perplexity_high: float
    agreement: float


def run(settings: TuneSettings, *, console: Console) -> None:
    """Measure and tell."""
    proposal = propose(settings, tell=lambda text: console.print(text, highlight=False))
    console.print(table(proposal))
    console.print(sentence(proposal), highlight=False, soft_wrap=True)


def propose(settings: TuneSettings, *, tell: Callable[[str], None]) -> Proposal:
    """Measure, fit, choose, judge. Raises ValueError with a message for the user."""
    store = launch.ensure_store(settings.model)
    points = _points(settings, store, tell=tell)
    curve = fit(points)
    alpha = smallest(curve, tpot_ms=settings.tpot)
    share = slots_share(settings, read_manifest(store))
    tell(f"judging alpha {alpha:g} with {100 * share:.1f} % of all experts in slots")
    row = _judged(store, alpha=alpha, share=share, tell=tell)
    return _proposal(curve, alpha, points, row, batch=settings.batch)


def slots_share(settings: ServeSettings, manifest: Manifest) -> float:
    """What part of all experts the nodes' slots hold together; at most all of them."""
    slots = settings.slots or 2 * manifest.top_k
    if settings.memory_mb is not None:
        slots = settings.memory_mb * 1_000_000 // manifest.record_bytes
    return min(1.0, settings.nodes * slots / (manifest.num_moe_layers * manifest.num_experts))


def table(proposal: Proposal) -> Table:
    """For the terminal."""
    drawn = Table(title=f"alpha {proposal.alpha:g}: {proposal.tpot_ms:.1f} ms a token", title_justify="left")
    for head in ("alpha", "measured ms a token"):
        drawn.add_column(head, justify="right")
    for alpha, took_ms in sorted(proposal.points.items()):
        drawn.add_row(f"{alpha:g}", f"{took_ms:.1f}")
    return drawn


def sentence(proposal: Proposal) -> str:
    """What the proposed alpha costs."""
    return (
        f"--alpha {proposal.alpha:g}: perplexity {100 * proposal.perplexity_vs_gated:+.2f} % "
        f"({100 * proposal.perplexity_low:+.2f} to {100 * proposal.perplexity_high:+.2f}), likeliest token as at alpha "
        f"0 in {100 * proposal.agreement:.1f} %, hit rate {100 * proposal.hit_rate:.1f} %"
    )


def _points(settings: TuneSettings, store: Path, *, tell: Callable[[str], None]) -> list[Point]:
    points = []
    unpinned = Cores(main=None, beside=None)
    named = settings.model_copy(update={"served_model_names": (served.NAME,)})
    with running(named, store=store, cores=unpinned, tell=lambda text: None) as roles:
        served.warm(roles)
        for alpha in settings.alphas:
            timed = served.time_batch(roles, batch=settings.batch, tokens=TOKENS, alpha=alpha)
            points.append(Point(alpha=alpha, tpot_ms=timed.tpot_ms))
            tell(f"alpha {alpha:g}: {timed.tpot_ms:.1f} ms a token")
    return points


def _judged(store: Path, *, alpha: float, share: float, tell: Callable[[str], None]) -> Row:
    job = Job(
        store=str(store),
        name="quality",
        speaks=True,
        tokens=JUDGED_TOKENS,
        texts=JUDGED_TEXTS,
        questions=0,
        only=(alpha, share),
        load_ratio=LOAD_RATIO,
        host_ratio=HOST_RATIO,
    )
    return next(row for row in replay_job(job, tell).rows if row.policy == IMPORTANCE)


def _proposal(curve: Curve, alpha: float, points: Sequence[Point], row: Row, *, batch: int) -> Proposal:
    quality = (row.perplexity, row.perplexity_vs_gated, row.perplexity_low, row.perplexity_high, row.agreement)
    perplexity, gap, low, high, agreement = (0.0 if value is None else value for value in quality)
    return Proposal(
        alpha=alpha,
        tpot_ms=curve.at(alpha),
        points={point.alpha: point.tpot_ms for point in points},
        slots_share=row.slots_share,
        batch=batch,
        hit_rate=row.hit_rate,
        perplexity=perplexity,
        perplexity_vs_gated=gap,
        perplexity_low=low,
        perplexity_high=high,
        agreement=agreement,
    )
