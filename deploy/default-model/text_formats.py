"""Turns packaged files into plain text: HTML pages, fortune files, Wesnoth scenarios, question-and-answer YAML.

Knows formats only. Does not know where files come from or which of them are held out.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import yaml  # type: ignore[import-untyped]

_BLOCKS = {"p", "pre", "li", "h1", "h2", "h3", "h4", "dt", "dd", "td", "th", "tr", "div", "section"}
_SKIPPED = {"script", "style", "nav", "head", "header", "footer", "button", "svg"}
_LINE = re.compile(r"speaker\s*=\s*\"?([^\n\"]+)|message\s*=\s*_\s*\"((?:[^\"]|\"\")*)\"", re.S)


class _PageText(HTMLParser):
    """Collects the readable text of a page; white space is kept only inside <pre>."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._skip_depth = 0
        self._pre_depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._skip_depth += tag in _SKIPPED
        self._pre_depth += tag == "pre"
        if tag in _BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._skip_depth = max(0, self._skip_depth - (tag in _SKIPPED))
        self._pre_depth = max(0, self._pre_depth - (tag == "pre"))
        if tag in _BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if self._skip_depth == 0:
            self.parts.append(data if self._pre_depth else re.sub(r"\s+", " ", data))


def html_text(path: Path) -> str:
    """The readable text of an HTML page."""
    page = _PageText()
    page.feed(path.read_text("utf-8", errors="replace"))
    lines = [line.rstrip() for line in "".join(page.parts).split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).replace("¶", "").strip()


def fortune_text(path: Path) -> str:
    """A fortune file with blank lines between its quotations."""
    return path.read_text("utf-8", errors="replace").replace("\n%\n", "\n\n").expandtabs(4)


def scenario_text(path: Path) -> str:
    """The spoken lines of a Wesnoth scenario, each as `Speaker: words`."""
    lines: list[str] = []
    speaker = "Narrator"
    for found in _LINE.finditer(path.read_text("utf-8", errors="replace")):
        if found[1]:
            speaker = found[1].strip().split("#")[0].strip().capitalize()
        elif found[2]:
            words = " ".join(found[2].replace('""', '"').split())
            lines.append(f"{speaker}: {words}")
    return "\n".join(lines)


def conversation_text(path: Path) -> str:
    """Question-and-answer YAML of the ChatterBot corpus, turns marked A and B."""
    conversations = yaml.safe_load(path.read_text("utf-8"))["conversations"]
    return "\n\n".join(
        "\n".join(f"{'AB'[i % 2]}: {' '.join(str(turn).split())}" for i, turn in enumerate(turns))
        for turns in conversations
    )


def plain_text(path: Path) -> str:
    """A file as it is (source code, AsciiDoc)."""
    return path.read_text("utf-8", errors="replace")
