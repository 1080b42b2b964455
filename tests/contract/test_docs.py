"""What the documents name exists: paths, modules, names of code, make targets, commands, flags, variables, links.

Knows Markdown's code spans, fences and links; does not judge the prose. Each check is a function from a document's
text to complaints, and is itself shown a text that breaks it.
"""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from itertools import takewhile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("server", "node_agent", "predictor", "tests", "deploy", ".github", ".ci")
FILE_ENDINGS = (
    "py",
    "md",
    "toml",
    "txt",
    "yml",
    "yaml",
    "json",
    "jsonl",
    "sh",
    "service",
    "typed",
    "safetensors",
    "lock",
)
DOTTED_MODULE = re.compile(r"odmoe_(?:server|node|predictor|model|wire)(?:\.\w+)+")
SHELLS = {"sh", "bash", "shell", "console"}
# The names pyproject.toml gives the programs, and the module each starts in.
PROGRAMS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]

Check = Callable[[str], list[str]]


@cache
def repository_files() -> tuple[str, ...]:
    """Every file of the repository, as a path with forward slashes, without what tools leave behind."""
    found = []
    for folder, names, files in os.walk(ROOT):
        names[:] = [
            name for name in names if not re.fullmatch(r"\.git|\.?venv|__pycache__|build|dist|\..*_cache", name)
        ]
        found += [(Path(folder) / file).relative_to(ROOT).as_posix() for file in files]
    return tuple(found)


def documents() -> list[str]:
    return sorted(file for file in repository_files() if file.endswith(".md"))


@cache
def code() -> str:
    """All Python of the product and of its tests' helpers, to look names up in."""
    parts = ("server/", "node_agent/", "predictor/", "tests/support/", "deploy/")
    return "\n".join(
        (ROOT / file).read_text("utf-8")
        for file in repository_files()
        if file.endswith(".py") and file.startswith(parts)
    )


# ------------------------------------------------------------------------------------- what a document is made of


def fences(text: str) -> list[tuple[str, str]]:
    """(language, body) of every fenced block."""
    return re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    """The document without fences and comments."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)


def spans(text: str) -> list[str]:
    """Every `code span` of the prose."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(text))]


def commands(text: str) -> Iterator[list[str]]:
    """Every simple command of the shell blocks, and every span that is a command of ours, as words."""
    blocks = [body.replace("\\\n", " ") for language, body in fences(text) if language in SHELLS]
    lines = [line.strip().removeprefix("$ ") for body in blocks for line in body.splitlines()]
    lines += [span for span in spans(text) if span.split()[0] in {"make", *PROGRAMS}]
    for line in lines:
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;")
        lexer.whitespace_split = True
        command: list[str] = []
        for word in [*lexer, ";"]:
            if not set(word) <= set("|&;"):
                command.append(word)
            elif command:
                yield without_assignments(command)
                command = []


def without_assignments(command: list[str]) -> list[str]:
    while command and re.match(r"[A-Z_]+=", command[0]):
        command = command[1:]
    return command[command[:1] == ["exec"] :]


# -------------------------------------------------------------------------------------------------------- checks


def missing_paths(text: str) -> list[str]:
    return [span for span in spans(text) if is_path(span) and not path_exists(span)]


def is_path(span: str) -> bool:
    if not re.fullmatch(r"[\w.*/-]+", span) or span.startswith(("/", "-")):
        return False
    return (span.split("/")[0] in FOLDERS and "/" in span) or span.rpartition(".")[2] in FILE_ENDINGS


def path_exists(span: str) -> bool:
    """From the root, or the end of a path; a folder too; `*` is any part of a name; or a file the code writes."""
    if "/" not in span and f'"{span}"' in code():
        return True
    pattern = re.escape(span.rstrip("/")).replace(r"\*", "[^/]*")
    return any(re.search(rf"(^|/){pattern}($|/)", file) for file in repository_files())


def missing_modules(text: str) -> list[str]:
    return [span for span in spans(text) if DOTTED_MODULE.fullmatch(span) and not module_exists(span)]


def module_exists(span: str) -> bool:
    """A module, or one name in it."""
    *parent, name = span.split(".")
    if path_exists(span.replace(".", "/") + ".py") or path_exists(span.replace(".", "/") + "/__init__.py"):
        return True
    files = [file for file in repository_files() if re.search(rf"(^|/){'/'.join(parent)}(/__init__)?\.py$", file)]
    return any(re.search(rf"\b{name}\b", (ROOT / file).read_text("utf-8")) for file in files)


def missing_names(text: str) -> list[str]:
    """`Names` of classes and messages, and `functions()`."""
    wanted = [span.removesuffix("()") for span in spans(text) if re.fullmatch(r"[A-Z]+[a-z]\w*|[a-z_]+\(\)", span)]
    return [name for name in wanted if not re.search(rf"\b{name}\b", code())]


def missing_targets(text: str) -> list[str]:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    variables = set(re.findall(r"^([A-Z_]+) \?=", makefile, flags=re.MULTILINE))
    found = []
    for program, *words in commands(text):
        if program == "make":
            named = {word.partition("=")[0] for word in words}
            found += [f"make {word}" for word in named if word not in targets | variables]
    return found


def unknown_commands(text: str) -> list[str]:
    """Commands of ours that are not there, or that do not take a flag they are given here."""
    found = []
    for program, *words in commands(text):
        if program not in PROGRAMS:
            continue
        sub = sub_of([program, *words])
        try:
            help_text = help_of(program, sub)
        except LookupError:
            found.append(f"{program} {sub}")
            continue
        flags = [word.partition("=")[0] for word in words if word.startswith("--")]
        found += [f"{program} {sub} {flag}" for flag in flags if not mentions(help_text, flag)]
    return found


def unknown_flags(text: str) -> list[str]:
    """Flags named alone, such as `--slots` or `--slots N`: some command or script of ours must take them."""
    flags = {match[0] for span in spans(text) if (match := re.match(r"--[a-z-]+", span))}
    return [flag for flag in sorted(flags) if not (mentions(all_help(), flag) or f'"{flag}"' in code())]


def unknown_variables(text: str) -> list[str]:
    """`ODMOE_...` environment variables, in prose and in fences."""
    variables = set(re.findall(r"\bODMOE_[A-Z_]+\b", text))
    return [name for name in sorted(variables) if not mentions(all_help() + code(), name)]


def mentions(help_text: str, word: str) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", help_text) is not None


@cache
def help_of(program: str, sub: str) -> str:
    """What `program [sub] --help` prints; LookupError if there is no such command."""
    module, _, function = PROGRAMS[program].partition(":")
    script = f"import sys; sys.argv[0] = {program!r}; from {module} import {function} as main; sys.exit(main())"
    command = [sys.executable, "-c", script, *sub.split(), "--help"]
    environment = os.environ | {"COLUMNS": "250", "TERM": "dumb", "NO_COLOR": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, env=environment)
    if done.returncode != 0:
        raise LookupError(f"{program} {sub}: {done.stderr}")
    return done.stdout


@cache
def all_help() -> str:
    """The help of every program, and of every `odmoe` command that the documents name and that is there."""
    named = {
        sub
        for file in documents()
        for command in commands((ROOT / file).read_text("utf-8"))
        if (sub := sub_of(command))
    }
    texts = []
    for program, sub in [("odmoe-node", ""), ("odmoe-predictor", ""), *(("odmoe", sub) for sub in sorted(named))]:
        with suppress(LookupError):  # `unknown_commands` reports it, for the document that names it
            texts.append(help_of(program, sub))
    return "\n".join(texts)


def sub_of(command: list[str]) -> str:
    """The subcommand, such as `serve` or `bench decode`; empty where there is none."""
    program, *words = command
    depth = 2 if words[:1] == ["bench"] else 1
    return " ".join(takewhile(lambda word: not word.startswith("-"), words[:depth])) if program == "odmoe" else ""


def unknown_urls(text: str) -> list[str]:
    """Paths of the HTTP API: spans such as `/health`, `GET /health`, and those of curl commands on this machine."""
    in_spans = [match[1] for span in spans(text) if (match := re.fullmatch(r"(?:(?:GET|POST) )?(/[a-z0-9/_]+)", span))]
    in_curls = re.findall(r"https?://(?:localhost|127\.0\.0\.1):\d+(/[a-z0-9/_]+)", text)
    # `/v1` alone is the base address that clients are given; routes below it are written without it in the code.
    named = {*in_spans, *in_curls} - {"/v1"}
    return [path for path in named if not any(f'"{known}"' in code() for known in (path, path.removeprefix("/v1")))]


def broken_blocks(text: str) -> list[str]:
    """Fenced Python and JSON must parse."""
    found = []
    for language, body in fences(text):
        try:
            if language == "python":
                ast.parse(body)
            elif language == "json":
                json.loads(body)
        except (ValueError, SyntaxError) as error:
            found.append(f"{language} block: {error}")
    return found


CHECKS: list[Check] = [
    missing_paths,
    missing_modules,
    missing_names,
    missing_targets,
    unknown_commands,
    unknown_flags,
    unknown_variables,
    unknown_urls,
    broken_blocks,
]


def broken_links(text: str, *, folder: Path) -> list[str]:
    """Links within the repository: the file is there, and the heading in it."""
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        linked = (folder / path).read_text("utf-8") if anchor and path and (folder / path).is_file() else text
        if not (folder / path).exists() or (anchor and anchor not in anchors(linked)):
            found.append(target)
    return found


def anchors(text: str) -> set[str]:
    """The names GitHub gives the headings."""
    headings = re.findall(r"^#+ +(.*?) *$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("document", documents())
def test_what_it_names_exists(document: str, check: Check) -> None:
    found = check((ROOT / document).read_text("utf-8"))
    assert not found, "\n".join(found)


@pytest.mark.parametrize("document", documents())
def test_links_lead_somewhere(document: str) -> None:
    assert broken_links((ROOT / document).read_text("utf-8"), folder=(ROOT / document).parent) == []


def test_the_documents_are_there() -> None:
    assert {"README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md"} <= set(documents())


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (missing_paths, "see `server/odmoe_server/nowhere.py`"),
        (missing_paths, "see `nowhere.py`"),
        (missing_paths, "see `tests/nowhere/`"),
        (missing_modules, "see `odmoe_wire.nowhere`"),
        (missing_modules, "see `odmoe_wire.messages.Nowhere`"),
        (missing_names, "a `Nowhereman` is sent"),
        (missing_names, "it calls `nowhere_at_all()`"),
        (missing_targets, "run `make nothing`"),
        (missing_targets, "```sh\ncd odmoe && make test NOTHING=1\n```\n"),
        (unknown_commands, "run `odmoe nothing`"),
        (unknown_commands, "run `odmoe bench nothing`"),
        (unknown_commands, "run `odmoe bench recall --nothing`"),
        (unknown_commands, "```sh\nodmoe serve \\\n  --nothing 1\n```\n"),
        (unknown_commands, "```sh\nOMP_NUM_THREADS=1 odmoe-node --nothing | cat\n```\n"),
        (unknown_flags, "with `--nothing N`"),
        (unknown_variables, "set `ODMOE_NOTHING`"),
        (unknown_urls, "ask `GET /nothing`"),
        (unknown_urls, "```sh\ncurl http://127.0.0.1:8000/v1/nothing\n```\n"),
        (broken_blocks, "```python\nif:\n```\n"),
        (broken_blocks, "```json\n{'a': 1}\n```\n"),
    ],
)
def test_each_check_can_fail(check: Check, text: str) -> None:
    assert check(text)


@pytest.mark.parametrize("link", ["nowhere.md", "README.md#nowhere", "#nowhere"])
def test_a_broken_link_is_found(link: str) -> None:
    assert broken_links(f"see [there]({link})", folder=ROOT) == [link]


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (missing_paths, "`messages.py`, `tests/contract/`, `application/json`, `/health`, `odmoe_wire/*.py`"),
        (missing_modules, "`odmoe_wire.messages` and `odmoe_wire.messages.Hello`"),
        (missing_names, "`Hello` and `place()`"),
        (missing_targets, "```sh\ngit clone there && cd odmoe && make test ARGS=-x\n```\n"),
        (unknown_commands, "```sh\nmake serve | tee log; odmoe-node --help\n```\n"),
    ],
)
def test_checks_let_true_statements_pass(check: Check, text: str) -> None:
    assert check(text) == []
