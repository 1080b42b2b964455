"""No wait, deadline or decision looks at the wall clock, which jumps: it is for dates that people read."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("server", "node_agent", "predictor")
WALL = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.today", "time.localtime"}
# Where the date is written down for people or clients, and nothing is done by it.
DATES = {
    "server/odmoe_server/bench/record.py",
    "server/odmoe_server/cluster/timeline_file.py",
    "server/odmoe_server/engine/recordings.py",
    "server/odmoe_server/openai/chat.py",
    "server/odmoe_server/openai/completions.py",
    "server/odmoe_server/openai/responses.py",
    "server/odmoe_server/serving.py",
    "server/odmoe_server/tracing/spans.py",
}


def wall_clock(source: str) -> list[str]:
    """Calls of a clock that can jump."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [f"line {call.lineno}: {ast.unparse(call)}" for call in calls if ast.unparse(call.func) in WALL]


def test_no_decision_depends_on_the_wall_clock() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {call}"
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path.relative_to(ROOT).as_posix() not in DATES
        for call in wall_clock(path.read_text("utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize("source", ["import time\nuntil = time.time() + 5\n", "x = datetime.now(UTC)\n"])
def test_a_wall_clock_is_found(source: str) -> None:
    assert wall_clock(source)


def test_the_monotonic_one_is_no_wall_clock() -> None:
    assert not wall_clock("import time\nnow = time.monotonic() + time.perf_counter()\n")
