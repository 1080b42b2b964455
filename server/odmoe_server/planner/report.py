"""Answers as tables for the terminal. Computes nothing but units."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Final

from rich.table import Table

from odmoe_server.planner.answer import Answer, Question
from odmoe_server.planner.bench import Compared
from odmoe_server.planner.paper import Row
from odmoe_server.planner.search import Found

# A node may fail without a trace where another can hold its layers. Any node can hold any layer.
SPARE_FROM: Final = 2


def answer_table(question: Question, answer: Answer) -> Table:
    """What was predicted."""
    grid = _grid(f"odmoe plan: {question.shape.name}", "", "predicted")
    steps, decoded = answer.times, answer.decoded
    grid.add_row("decoding", f"{decoded.tokens_per_s:.3g} tokens/s")
    grid.add_row("first token", f"{answer.first_token_s:.3g} s after {question.prompt_tokens} tokens of prompt")
    grid.add_row("waiting for loads", f"{decoded.stall_share:.0%} of the time")
    grid.add_row("loads after the gate", f"{decoded.reloads / decoded.loads:.1%} of all")
    grid.add_row("bounded by", answer.bound)
    for what, tokens_per_s in answer.if_free:
        grid.add_row(f"  without {what}", f"{tokens_per_s:.3g} tokens/s")
    grid.add_section()
    grid.add_row("nodes", f"{len(question.machines.nodes)}, in {answer.num_groups} groups")
    hidden = "" if answer.hidden_load_s is None else f", hidden up to {_ms(answer.hidden_load_s)}"
    if len(question.machines.nodes) < SPARE_FROM:
        grid.add_row("  failover", "none: every layer has one node that can hold it; with two, one may fail")
    grid.add_row("a load", f"{_ms(max(steps.load_s))}{hidden}")
    grid.add_row("a layer of the server", _ms(steps.main_s))
    grid.add_row("an expert on a node", _ms(steps.expert_s))
    grid.add_row("a layer of the shadow", _ms(steps.shadow_s))
    grid.add_row("a message", f"{_ms(steps.latency_s + steps.row_s)}, {_ms(steps.row_s)} of it on the wire")
    grid.add_section()
    for what, amount in _memory(answer):
        grid.add_row(what, amount)
    return grid


def _memory(answer: Answer) -> Iterator[tuple[str, str]]:
    needed = answer.memory
    yield "device memory: server", _gb(needed.main_bytes)
    yield "  shadow", _gb(needed.shadow_bytes)
    yield "  each node", _gb(needed.node_bytes)
    yield "  in total", f"{_gb(needed.total_bytes)}, {needed.total_bytes / needed.resident_bytes:.0%} of all resident"
    yield "store of each node", f"{_gb(needed.store_bytes)}, decoding reads {_gb(needed.store_read_decoding_bytes)}"


def search_table(tokens_per_s: float, *, nodes: Found, link: Found, question: Question) -> Table:
    """What it takes to reach a speed."""
    grid = _grid(f"for {tokens_per_s:g} tokens/s", "", "it takes", "which gives")
    size = question.machines.nodes[0].link_gb_per_s
    at_nodes = "cannot be reached" if nodes.least is None else f"{nodes.least:g} nodes"
    at_link = "cannot be reached" if link.least is None else f"{link.least:.3g} GB/s"
    for what, takes, found in [
        (f"at {size:g} GB/s", at_nodes, nodes),
        (f"with {len(question.machines.nodes)} nodes", at_link, link),
    ]:
        most = "at most " if found.least is None else ""
        grid.add_row(what, takes, f"{most}{found.tokens_per_s:.3g} tokens/s")
    return grid


def paper_tables(rows: Sequence[Row]) -> Iterator[Table]:
    """The paper's figures beside ours, a table for each of its own."""
    for name, of_table in groupby(rows, key=lambda row: row.table):
        grid = _grid(f"OD-MoE, {name}", "", "paper", "plan", "off by", "")
        for row in of_table:
            ours, difference = ("-", "-") if row.ours is None else (f"{row.ours:.4g}", f"{row.difference:+.1%}")
            mark = f"{row.note or row.status}{', TOO FAR OFF' if row.off else ''}"
            grid.add_row(f"{row.what}, {row.unit}", f"{row.paper:.4g}", ours, difference, mark)
        yield grid


def bench_tables(rows: Sequence[Compared]) -> Iterator[Table]:
    """A record's figures beside ours: the speed of decoding, and the first token where there is one."""
    speeds = _grid("decoding, tokens/s", "", "link ratio", "measured", "plan", "off by", "")
    firsts = _grid("first token, s", "", "link ratio", "measured", "plan", "off by")
    for row in rows:
        what = (row.variant, _number(row.link_ratio))
        mark = f"TOO FAR OFF {row.note}".strip() if row.off else row.note
        speeds.add_row(
            *what, _number(row.tokens_per_s), _number(row.predicted_tokens_per_s), _off_by(row.difference), mark
        )
        if row.first_difference is not None:
            firsts.add_row(*what, _number(row.first_s), _number(row.predicted_first_s), _off_by(row.first_difference))
    yield speeds
    if firsts.rows:
        yield firsts


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _off_by(difference: float | None) -> str:
    return "-" if difference is None else f"{difference:+.0%}"


def _grid(title: str, *columns: str) -> Table:
    return Table(*columns, title=title, title_justify="left")


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _gb(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:.3g} GB"
