"""The picture of a decode record: speed over the resident run's for each variant, and what of it was spent waiting.

Knows rows and the figures the OD-MoE paper printed; measures nothing.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from odmoe_server.bench.plotting import figure
from odmoe_server.bench.variants import RESIDENT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_RESIDENT_TOKENS_PER_S: Final = 4.89
# Of OD-MoE on its own testbed (arXiv 2512.03927): Table 2, and tokens/s of Figure 8 over Table 2's cached model.
PAPER: Final = {
    "on-demand-late": 0.755,
    "token-only": 3.453 / _RESIDENT_TOKENS_PER_S,
    "kv-only": 2.445 / _RESIDENT_TOKENS_PER_S,
    "no-alignment": 1.185 / _RESIDENT_TOKENS_PER_S,
    "random-prefetch": 1.046 / _RESIDENT_TOKENS_PER_S,
    "no-predictor": 1.032 / _RESIDENT_TOKENS_PER_S,
}
_COLOURS: Final = ("#2f6f9f", "#e0903a", "#5a9367", "#8a6bb1")
_GROUP: Final = 0.8


def draw(rows: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Write the picture, a PNG."""
    ours = [row for row in rows if row["variant"] != RESIDENT]
    names = list(dict.fromkeys(row["variant"] for row in ours))
    drawing = figure(width=max(7.0, 1.5 + 1.25 * len(names)), height=7.0)
    speed, stalled = drawing.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    _bars(speed, ours, names, "ratio_to_resident")
    _bars(stalled, ours, names, "stall_share")
    places = [names.index(name) for name in PAPER if name in names]
    values = [PAPER[name] for name in PAPER if name in names]
    speed.scatter(places, values, marker="_", s=500, linewidths=2.5, color="black", zorder=3, label="OD-MoE paper, 4.4")
    speed.axhline(1.0, color="grey", linewidth=1, linestyle=":")
    speed.set_ylabel("decode speed / resident")
    speed.set_title(title, fontsize=11)
    drawing.legend(*speed.get_legend_handles_labels(), fontsize=9, loc="outside lower center", ncols=3)
    stalled.set_ylabel("share of decoding\nstalled on loads")
    stalled.set_ylim(0, 1)
    stalled.set_xticks(range(len(names)), names, rotation=20, ha="right")
    drawing.savefig(path)


def _bars(axes: "Axes", rows: Sequence[Mapping[str, Any]], names: Sequence[str], field: str) -> None:
    ratios = sorted({row["link_ratio"] for row in rows}, reverse=True)
    width = _GROUP / len(ratios)
    for number, ratio in enumerate(ratios):
        chosen = [row for row in rows if row["link_ratio"] == ratio]
        places = [names.index(row["variant"]) - _GROUP / 2 + (number + 0.5) * width for row in chosen]
        colour = _COLOURS[number % len(_COLOURS)]
        values = [row[field] for row in chosen]
        bars = axes.bar(places, values, 0.94 * width, color=colour, label=f"link ratio {ratio:g}")
        axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=1)
    axes.grid(axis="y", linewidth=0.4, alpha=0.6)
    axes.set_axisbelow(True)
    axes.margins(y=0.12)
