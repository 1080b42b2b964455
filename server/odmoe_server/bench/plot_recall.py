"""The picture of a recall record: recall against the token's index for each alignment, and of rivals against layers
ahead. Knows the form of rows and curves; measures nothing."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from odmoe_server.bench.plotting import figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]

SHADOW: Final = "shadow"
# Whether token and KV are aligned, by what it is called in the paper.
ALIGNMENTS: Final = {
    (True, True): "token and KV",
    (True, False): "token only",
    (False, True): "KV only",
    (False, False): "neither",
}
_PREFERRED: Final = ("int8", "model")
_WINDOW: Final = 8
_COLOURS: Final = ("#2f6f9f", "#e0903a", "#5a9367", "#8a6bb1", "#b5484f", "#777777")


def draw(rows: Sequence[Row], curves: Sequence[Row], path: Path, *, title: str) -> None:
    """Write the picture, a PNG."""
    drawing = figure(width=11.0, height=5.4)
    by_index, by_distance = drawing.subplots(1, 2, sharey=True)
    _draw_curves(by_index, curves)
    _draw_rivals(by_distance, rows)
    for axes in (by_index, by_distance):
        axes.set_ylim(0, 1.03)
        axes.grid(linewidth=0.4, alpha=0.6)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4)
    drawing.suptitle(title, fontsize=11)
    drawing.savefig(path)


def alignment(row: Row) -> tuple[bool, bool]:
    """Whether token and KV are aligned at every step."""
    return str(row["align_token"]) == "1", str(row["align_kv"]) == "1"


def chosen_curves(curves: Sequence[Row]) -> list[tuple[str, Row]]:
    """(name, curve) of each alignment in the paper's order, all of one precision and scope: of an int8 copy of the
    whole model, or else the first there is. Other periods than 1 and off are
    left out, and shadows that compute a prompt's keys and values themselves."""
    if not curves:
        return []
    kinds = [(curve["precision"], curve["scope"]) for curve in curves]
    kind = _PREFERRED if _PREFERRED in kinds else kinds[0]
    of_kind = [curve for curve, its in zip(curves, kinds, strict=True) if its == kind and _is_plain(curve)]
    first = {alignment(curve): curve for curve in reversed(of_kind)}
    return [(name, first[key]) for key, name in ALIGNMENTS.items() if key in first]


def _is_plain(curve: Row) -> bool:
    periods = {str(curve["align_token"]), str(curve["align_kv"])}
    return periods <= {"1", "off"} and curve.get("prompt_kv") in (None, "full")


def smoothed(recall: Sequence[float], alive: Sequence[float], *, window: int) -> list[float]:
    """The mean over the last `window` indices, each by how many answers were that long."""
    ends = range(1, len(recall) + 1)
    pieces = [slice(max(0, end - window), end) for end in ends]
    return [
        sum(r * a for r, a in zip(recall[piece], alive[piece], strict=True)) / max(sum(alive[piece]), 1e-9)
        for piece in pieces
    ]


def _draw_curves(axes: "Axes", curves: Sequence[Row]) -> None:
    chosen = chosen_curves(curves)
    for name, curve in chosen:
        values = smoothed(curve["recall"], curve["alive"], window=_WINDOW)
        axes.plot(range(1, len(values) + 1), values, linewidth=1.4, label=name)
    kind = f"{chosen[0][1]['precision']}, {chosen[0][1]['scope']}" if chosen else "no curves"
    axes.set_title(f"shadow ({kind}), aligned at every step with", fontsize=10)
    axes.set_xlabel(f"token of the answer (mean of the last {_WINDOW})")
    axes.set_ylabel("recall")


def _draw_rivals(axes: "Axes", rows: Sequence[Row]) -> None:
    colours = cycle(_COLOURS)
    for name, points in rivals(rows):
        known = [point for point in points if point[0] is not None]
        if known:
            axes.plot(*zip(*known, strict=True), marker="o", linewidth=1.4, color=next(colours), label=name)
        else:
            axes.axhline(points[0][1], linewidth=1.2, linestyle=":", color=next(colours), label=name)
    aligned = [row for row in rows if row["predictor"] == SHADOW and alignment(row) == (True, True)]
    for row in aligned[:1]:
        axes.axhline(row["recall"], color="black", linewidth=1, linestyle="--", label=f"shadow, {row['precision']}")
    axes.set_title("other predictors; dotted: known before the token's first layer", fontsize=10)
    axes.set_xlabel("layers ahead")
    axes.set_xticks(sorted({ahead for _, points in rivals(rows) for ahead, _ in points if ahead is not None}))


def rivals(rows: Sequence[Row]) -> Iterator[tuple[str, list[tuple[int | None, float]]]]:
    """(name, [(layers ahead, recall), ..]) of every predictor that is no shadow; None is no distance of its own."""
    names = dict.fromkeys(row["predictor"] for row in rows if row["predictor"] != SHADOW)
    for name in names:
        points = [(row.get("layers_ahead"), row["recall"]) for row in rows if row["predictor"] == name]
        yield name, sorted(points, key=lambda point: point[0] or 0)
