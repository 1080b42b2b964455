"""The picture of an importance record: quality and time against alpha, hit rate against slots. Knows rows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from odmoe_server.bench.importance.arms import GOAL_SHARE, IMPORTANCE, LRU
from odmoe_server.bench.importance.rows import REPLAYED, SERVED
from odmoe_server.bench.plotting import figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = Sequence[Mapping[str, Any]]
_COLOURS: Final = ("#2f6f9f", "#e0903a", "#5a9367", "#8a6bb1")
_STYLES: Final = {1: "-", 3: "--"}


def draw(rows: Rows, path: Path, *, title: str) -> None:
    """Write the picture, a PNG."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    drawing = figure(width=11.0, height=8.0)
    (quality, agreement), (time, hits) = drawing.subplots(2, 2)
    for number, model in enumerate(models):
        colour = _COLOURS[number % len(_COLOURS)]
        for batch, style in _STYLES.items():
            mine = [row for row in rows if row["model"] == model and row["batch"] == batch]
            label = f"{model}, batch {batch}"
            _against_alpha(quality, mine, "perplexity_vs_gated", label, colour, style)
            _against_alpha(agreement, mine, "agreement", label, colour, style)
            _against_alpha(time, mine, "tpot_computed_vs_lru", label, colour, style)
            _measured(time, mine, label, colour)
            _against_slots(hits, mine, label, colour, style)
    quality.set_ylabel("perplexity against alpha 0, %")
    agreement.set_ylabel("likeliest token as at alpha 0, %")
    time.set_ylabel("time a token against LRU, %\n(lines computed, dots measured)")
    hits.set_ylabel("hit rate, %")
    hits.set_xlabel("experts in slots, % (thin: LRU)")
    for axes in (quality, agreement, time):
        axes.set_xlabel(f"alpha ({100 * GOAL_SHARE:g} % of experts in slots)")
    for axes in (quality, agreement, time, hits):
        axes.grid(linewidth=0.4, alpha=0.6)
    drawing.suptitle(title, fontsize=11)
    drawing.legend(*hits.get_legend_handles_labels(), fontsize=9, loc="outside lower center", ncols=3)
    drawing.savefig(path)


def _against_alpha(axes: "Axes", rows: Rows, field: str, label: str, colour: str, style: str) -> None:
    points = sorted(
        (row["alpha"], 100 * row[field])
        for row in rows
        if row["policy"] == IMPORTANCE
        and row["how"] == REPLAYED
        and row["slots_share"] == GOAL_SHARE
        and row[field] is not None
    )
    if points:
        axes.plot(*zip(*points, strict=True), style, color=colour, marker=".", label=label)


def _measured(axes: "Axes", rows: Rows, label: str, colour: str) -> None:
    points = [
        (row["alpha"], 100 * row["tpot_vs_lru"])
        for row in rows
        if row["policy"] == IMPORTANCE and row["how"] == SERVED and row["tpot_vs_lru"] is not None
    ]
    if points:
        alphas, times = zip(*points, strict=True)
        axes.scatter(alphas, times, color=colour, s=40, zorder=3, label=f"{label}, measured")


def _against_slots(axes: "Axes", rows: Rows, label: str, colour: str, style: str) -> None:
    replayed = [row for row in rows if row["how"] == REPLAYED]
    best = sorted(
        (r["slots_share"], r["hit_rate"]) for r in replayed if r["policy"] == IMPORTANCE and r["alpha"] == 0.35
    )
    least = sorted((row["slots_share"], row["hit_rate"]) for row in replayed if row["policy"] == LRU)
    for points, width, name in ((best, 1.8, label), (least, 0.7, None)):
        if points:
            shares, rates = zip(*points, strict=True)
            axes.plot(
                [100 * share for share in shares],
                [100 * rate for rate in rates],
                style,
                color=colour,
                linewidth=width,
                marker=".",
                label=name,
            )
