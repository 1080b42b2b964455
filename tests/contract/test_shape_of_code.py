"""The written rules of CONTRIBUTING.md that a script can check. Knows source text only; nothing is imported.

Each rule is a function from source text to complaints, and is itself shown a text that breaks it.
"""

import ast
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PRODUCT_FOLDERS = ("server", "node_agent", "predictor", "deploy")
TOP_LEVEL_FOLDERS = {"server", "node_agent", "predictor", "tests", "deploy"}
MOST_LINES_OF_A_FILE = 500
MOST_LINES_OF_A_FUNCTION = 60
UNPICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}

Rule = Callable[[str], list[str]]


def sources(*folders: str) -> list[Path]:
    """Every Python file below the folders, as paths relative to the repository."""
    return sorted(path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*.py"))


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def long_files(source: str) -> list[str]:
    length = len(source.splitlines())
    return [f"{length} lines, at most {MOST_LINES_OF_A_FILE}"] if length > MOST_LINES_OF_A_FILE else []


def long_functions(source: str) -> list[str]:
    lengths = {f"{node.name} (line {node.lineno})": length_of(node) for node in functions(ast.parse(source))}
    return [f"{name}: {length} lines" for name, length in lengths.items() if length > MOST_LINES_OF_A_FUNCTION]


def length_of(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def missing_docstring(source: str) -> list[str]:
    return [] if ast.get_docstring(ast.parse(source)) else ["no module docstring"]


def broad_excepts(source: str) -> list[str]:
    """A handler for everything passes it on, or a comment on its own line says why not."""
    lines = source.splitlines()
    return [
        f"line {node.lineno}: {lines[node.lineno - 1].strip()}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ExceptHandler)
        and catches_all(node.type)
        and not passes_on(node)
        and not reason(lines[node.lineno - 1])
    ]


def reason(line: str) -> bool:
    """Whether the line's comment says something beyond silencing the linter; one word is no reason."""
    comment = line.partition("#")[2].replace("noqa: BLE001", "")
    return len(re.findall(r"\w+", comment)) > 1


def catches_all(caught: ast.expr | None) -> bool:
    if isinstance(caught, ast.Tuple):
        return any(catches_all(item) for item in caught.elts)
    return caught is None or (isinstance(caught, ast.Name) and caught.id in {"Exception", "BaseException"})


def passes_on(handler: ast.ExceptHandler) -> bool:
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


def code_from_data(source: str) -> list[str]:
    """Everything that could run what a file or a peer sent: unpicklers, `torch.load`, `eval`, remote code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else names
            found += [f"line {node.lineno}: import {name}" for name in names if name.split(".")[0] in UNPICKLERS]
        elif isinstance(node, ast.Call):
            found += [f"line {node.lineno}: {complaint}" for complaint in unsafe_call(node)]
    return found


def unsafe_call(call: ast.Call) -> Iterator[str]:
    called = ast.unparse(call.func)
    if called in {"eval", "exec", "torch.load", "yaml.load"} or called.endswith((".recv_pyobj", ".send_pyobj")):
        yield called
    for keyword in call.keywords:
        refused = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
        if keyword.arg in {"trust_remote_code", "allow_pickle"} and not refused:
            yield f"{keyword.arg}={ast.unparse(keyword.value)}"


def sleeps(source: str) -> list[str]:
    return [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).split(".")[-1] == "sleep"
        and ast.unparse(node.args[0] if node.args else node) != "0"
    ]


def complaints(rule: Rule, *folders: str) -> list[str]:
    return [f"{path}: {found}" for path in sources(*folders) for found in rule((ROOT / path).read_text("utf-8"))]


@pytest.mark.parametrize("rule", [long_files, long_functions, missing_docstring, broad_excepts])
def test_rule_holds_everywhere(rule: Rule) -> None:
    found = complaints(rule, *PRODUCT_FOLDERS, "tests")
    assert not found, "\n".join(found)


def test_nothing_received_or_read_can_run_as_code() -> None:
    found = complaints(code_from_data, *PRODUCT_FOLDERS)
    assert not found, "\n".join(found)


def test_unit_tests_do_not_sleep() -> None:
    found = complaints(sleeps, "tests/unit")
    assert not found, "\n".join(found)


def test_every_folder_has_sources() -> None:
    empty = [folder for folder in ("server", "node_agent", "predictor", "tests/unit") if not sources(folder)]
    assert not empty, "the rules above would hold for nothing"


def test_test_files_have_names_of_their_own() -> None:
    names = [path.name for path in sources("tests") if path.name.startswith("test_")]
    assert sorted(names) == sorted(set(names))


def test_top_level_folders_are_the_fixed_set() -> None:
    assert top_level_folders() <= TOP_LEVEL_FOLDERS
    assert all((ROOT / name).is_dir() for name in TOP_LEVEL_FOLDERS)


def top_level_folders() -> set[str]:
    """Those git tracks; before the first commit or outside git, those that are there and are no build products."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    tracked = {line.split("/")[0] for line in listed.stdout.splitlines() if "/" in line}
    present = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"build", "dist", "__pycache__"}
    return {name for name in tracked or present if not name.startswith(".")}


@pytest.mark.parametrize(
    ("rule", "source"),
    [
        (long_files, "pass\n" * 501),
        (long_functions, "def f():\n" + "    pass\n" * 60),
        (long_functions, "class C:\n    async def f(self):\n" + "        pass\n" * 60),
        (missing_docstring, "import os\n"),
        (broad_excepts, "try:\n    f()\nexcept Exception:\n    g()\n"),
        (broad_excepts, "try:\n    f()\nexcept (OSError, BaseException):\n    g()\n"),
        (broad_excepts, "try:\n    f()\nexcept:\n    g()\n"),
        (broad_excepts, "try:\n    f()\nexcept Exception:  # noqa: BLE001\n    g()\n"),
        (code_from_data, "import pickle\n"),
        (code_from_data, "from cloudpickle import loads\n"),
        (code_from_data, "torch.load(path)\n"),
        (code_from_data, "AutoConfig.from_pretrained(path, trust_remote_code=flag)\n"),
        (code_from_data, "socket.recv_pyobj()\n"),
        (sleeps, "time.sleep(0.1)\n"),
        (sleeps, "await_it(asyncio.sleep(delay))\n"),
    ],
)
def test_each_rule_can_fail(rule: Rule, source: str) -> None:
    assert rule(source)


@pytest.mark.parametrize(
    ("rule", "source"),
    [
        (long_files, "pass\n" * 500),
        (long_functions, "def f():\n" + "    pass\n" * 59),
        (broad_excepts, "try:\n    f()\nexcept Exception:  # noqa: BLE001 - the loop must go on\n    g()\n"),
        (broad_excepts, "try:\n    f()\nexcept OSError:\n    g()\n"),
        (broad_excepts, "try:\n    f()\nexcept BaseException:\n    g()\n    raise\n"),
        (code_from_data, "AutoConfig.from_pretrained(path, trust_remote_code=False)\nmodel.eval()\n"),
        (sleeps, "asyncio.sleep(0)\n"),
    ],
)
def test_rules_let_good_code_pass(rule: Rule, source: str) -> None:
    assert not rule(source)
