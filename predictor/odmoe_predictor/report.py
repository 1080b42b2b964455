"""What the quantiser did, as a table for people. Knows no sockets and no model."""

from rich.table import Table

from odmoe_model.quantize import QuantizationReport, Treated

_MB = 1e6


def report_table(report: QuantizationReport) -> Table:
    """A row for each kind of weight: how many, bytes in the store, in float32 and now, and why."""
    table = Table(title="the shadow's weights", title_justify="left")
    for column in ("what", "treatment"):
        table.add_column(column)
    for column in ("weights, M", "stored, MB", "fp32, MB", "held, MB"):
        table.add_column(column, justify="right")
    table.add_column("why")
    for entry in report.entries:
        table.add_row(entry.what, entry.treatment, *_figures(entry), entry.reason)
    return table


def report_line(report: QuantizationReport) -> str:
    """The same in a line."""
    skipped = "; ".join(
        f"{entry.what} {entry.treatment} ({entry.reason})" for entry in report.entries if not entry.is_quantised
    )
    return (
        f"the shadow holds {report.held_bytes / _MB:.1f} MB for {report.stored_bytes / _MB:.1f} MB in the store; its "
        f"quantised weights take {100 * report.ratio_to_fp32():.1f} % of what they would in fp32; not quantised: "
        f"{skipped or 'nothing'}"
    )


def _figures(entry: Treated) -> list[str]:
    return [
        f"{entry.weights / 1e6:.2f}",
        f"{entry.stored_bytes / _MB:.2f}",
        f"{entry.fp32_bytes / _MB:.2f}",
        f"{entry.held_bytes / _MB:.2f}",
    ]
