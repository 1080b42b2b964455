"""Every number in the tables of deploy/scaling.md is what its command predicts."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from odmoe_server.planner import search
from odmoe_server.planner.answer import answer
from odmoe_server.planner.command import question_of
from odmoe_server.planner.question import PlanSettings
from odmoe_wire import settings

PAGE = Path(__file__).parents[2] / "deploy" / "scaling.md"
SPEED, SEARCH, MEMORY = "tokens/s", "nodes at 2 GB/s", "server, GB"


def rows() -> Iterator[tuple[str, str, list[str]]]:
    """(kind of table, options of odmoe plan, cells) of every row."""
    base = kind = ""
    for line in PAGE.read_text("utf-8").replace("\\\n", " ").splitlines():
        if line.startswith("odmoe plan "):
            base = line.removeprefix("odmoe plan ")
        elif line.startswith("| adds |"):
            kind = line.split("|")[2].strip()
        elif match := re.fullmatch(r"\| `(.+?)` \|(.+)\|", line):
            yield kind, f"{base} {match[1]}", [cell.strip() for cell in match[2].split("|")]


def predicted(kind: str, options: str) -> list[str]:
    """The cells of a row as they ought to be."""
    asked = settings.parse(PlanSettings, shlex.split(options), prog="odmoe plan")
    question = question_of(asked)
    if kind == SEARCH:
        assert asked.tokens_per_s is not None
        nodes, link = search.nodes_for(question, asked.tokens_per_s), search.link_for(question, asked.tokens_per_s)
        return ["none" if found.least is None else f"{found.least:.3g}" for found in (nodes, link)]
    found = answer(question)
    if kind == MEMORY:
        needed = found.memory
        sizes = (needed.main_bytes, needed.shadow_bytes, needed.node_bytes, needed.total_bytes)
        return [*(f"{size / 1e9:.3g}" for size in sizes), f"{needed.total_bytes / needed.resident_bytes:.0%}"]
    assert kind == SPEED
    decoded = found.decoded
    return [f"{decoded.tokens_per_s:.3g}", f"{found.first_token_s:.3g}", f"{decoded.stall_share:.0%}", found.bound]


def test_the_page_has_its_tables() -> None:
    assert {kind for kind, _, _ in rows()} == {SPEED, SEARCH, MEMORY}
    assert len(list(rows())) == 29


@pytest.mark.parametrize(("kind", "options", "cells"), list(rows()))
def test_each_row_is_what_its_command_says(kind: str, options: str, cells: list[str]) -> None:
    assert cells == predicted(kind, options)
