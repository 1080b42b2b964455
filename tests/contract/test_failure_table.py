"""`deploy/failures.md`: every row has a behaviour and tests, and every test it names is there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "deploy" / "failures.md").read_text("utf-8")
TEST = re.compile(r"`(tests/[\w/]+\.py)::([\w:]+)`")


def rows(page: str) -> list[list[str]]:
    """Cells of each row that tells of a fault."""
    lines = [line for line in page.splitlines() if line.startswith("|") and not line.startswith(("|---", "| fault"))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def names_of(path: Path) -> set[str]:
    """`function` and `Class::function` of every test in a file."""
    found = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return {name for name in found if name.split("::")[-1].startswith("test_")}


def complaints(page: str) -> list[str]:
    found = []
    for row in rows(page):
        named = TEST.findall(row[-1])
        if len(row) != 3 or not all(row) or not named:
            found.append(f"no fault, behaviour and tests: {row}")
        for file, name in named:
            if not (ROOT / file).is_file() or name not in names_of(ROOT / file):
                found.append(f"no such test: {file}::{name}")
    return found


def test_every_fault_has_a_behaviour_and_tests_that_exist() -> None:
    assert len(rows(PAGE)) > 25
    assert complaints(PAGE) == []


@pytest.mark.parametrize(
    "row",
    [
        "| a fault | nothing | `tests/contract/test_failure_table.py::test_nowhere` |",
        "| a fault | nothing | `tests/contract/test_nowhere.py::test_it` |",
        "| a fault | nothing | nobody looked |",
        "| a fault | | `tests/contract/test_failure_table.py::test_a_bad_row_is_found` |",
    ],
)
def test_a_bad_row_is_found(row: str) -> None:
    assert complaints(row)
