"""The record of `odmoe bench serve`: its columns, its notes, its picture. Measures nothing."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from odmoe_server.bench.plotting import figure
from odmoe_server.bench.record import Column, Machine, Record
from odmoe_server.bench.serve_question import ODMOE

# Every row has these, though they may be null.
FIELDS: Final = (
    "variant",
    "streams",
    "output_tokens_per_s",
    "ttft_ms_p50",
    "itl_ms_p50",
    "itl_ms_p99",
    "loads_per_token",
)
COLUMNS: Final = (
    Column("variant", "variant"),
    Column("streams", "streams", 0),
    Column("tokens/s", "output_tokens_per_s", 1),
    Column("tokens/s a user", "output_tokens_per_s_per_user", 2),
    Column("first token, ms, p50", "ttft_ms_p50", 0),
    Column("p90", "ttft_ms_p90", 0, brief=False),
    Column("p99", "ttft_ms_p99", 0, brief=False),
    Column("between tokens, ms, p50", "itl_ms_p50", 1),
    Column("p90", "itl_ms_p90", 1, brief=False),
    Column("p99", "itl_ms_p99", 1),
    Column("loads a token", "loads_per_token", 2),
    Column("CPU us a chunk", "cpu_us_per_chunk", 0),
)


def record_of(rows: Sequence[Mapping[str, Any]], *, facts: Mapping[str, Any], machine: Machine, command: str) -> Record:
    """Of rows as `serve.measure` gives them."""
    return Record(
        name="serve",
        title="Many users at once",
        command=command,
        machine=machine,
        columns=COLUMNS,
        rows=rows,
        facts=facts,
        notes=list(_notes(rows)),
    )


def _notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the table says, in sentences; only of rows that are there."""
    steady = [row for row in rows if row["output_tokens_per_s"]]
    speed = {(row["variant"], row["streams"]): row["output_tokens_per_s"] for row in steady}
    found = [
        f"{variant}: {speed[variant, 8] / speed[variant, 1]:.2f} times the tokens/s at 8 streams that 1 stream has."
        for variant, streams in speed
        if streams == 8 and speed.get((variant, 1))
    ]
    found += [
        f"{row['variant']}: while a prompt of {row['prompt_tokens']} tokens was prefilled, the p99 between tokens was"
        f" {row['itl_ms_p99'] / row['undisturbed_itl_ms_p50']:.2f} times the p50 before it came."
        for row in rows
        if row.get("undisturbed_itl_ms_p50") and row.get("itl_ms_p99")
    ]
    found += [
        f"{row['variant']}, {row['streams']} streams: {row['chunks_per_core_s']:.0f} streamed chunks/s of a core."
        for row in rows
        if row.get("chunks_per_core_s")
    ]
    found += [
        f"{row['variant']}, {row['streams']} streams: {share:.2%} of a step of {ODMOE} with as many streams."
        for row in rows
        if (share := _share_of_step(row, speed)) is not None
    ]
    return found


def _share_of_step(row: Mapping[str, Any], speed: Mapping[tuple[str, int], float]) -> float | None:
    """What the front end computes for a token, of the time the server has for one with as many streams."""
    tokens_per_s = speed.get((ODMOE, row["streams"]))
    if tokens_per_s is None or not row.get("cpu_us_per_chunk"):
        return None
    return float(row["cpu_us_per_chunk"] * row["chunks"] / row["output_tokens"] * tokens_per_s / 1e6)


def draw(rows: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Tokens/s and time between tokens over streams, a line for each variant; a PNG."""
    drawing = figure(width=8.0, height=4.0)
    speed, gaps = drawing.subplots(1, 2)
    lines = [row for row in rows if row.get("output_tokens_per_s_per_user")]
    for variant in dict.fromkeys(row["variant"] for row in lines):
        mine = [row for row in lines if row["variant"] == variant]
        streams = [row["streams"] for row in mine]
        speed.plot(streams, [row["output_tokens_per_s"] for row in mine], marker="o", label=variant)
        gaps.plot(streams, [row["itl_ms_p50"] or 0.0 for row in mine], marker="o")
    for axes, label in ((speed, "output tokens/s"), (gaps, "ms between tokens, p50")):
        axes.set_xlabel("streams")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
    drawing.suptitle(title, fontsize=10)
    if lines:
        drawing.legend(*speed.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=3)
    drawing.savefig(path)
