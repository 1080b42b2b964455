"""The texts: which packages they come from, under which licence, and which files are held out.

Knows sources only. Does not know how they are fetched (`collect_text`) or what they are used for. Every package here is
in Debian's `main` section or on PyPI under a licence that lets anyone copy, change and pass on the text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from text_formats import conversation_text, fortune_text, html_text, plain_text, scenario_text


@dataclass(frozen=True)
class Source:
    """Some files of one package and what to do with them."""

    kind: str
    package: str  # a Debian package, `pypi:NAME`, or `python` for the running interpreter's library
    licence: str
    patterns: tuple[str, ...]
    to_text: Callable[[Path], str]
    # Files whose path contains one of these are held out. Without any, one file in ten is, by its name's digest.
    heldout: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    # Never trained on at all: shows whether a gain carries over to sources nobody trained for.
    only_heldout: bool = False
    max_chars_per_file: int = field(default=60_000)


_CAMPAIGNS = "usr/share/games/wesnoth/1.16/data/campaigns/*/scenarios/*.cfg"
_HELDOUT_CAMPAIGNS = ("The_South_Guard", "Sceptre_of_Fire")

SOURCES: tuple[Source, ...] = (
    Source(
        kind="technical",
        package="rust-doc",
        licence="MIT or Apache-2.0",
        patterns=tuple(
            f"usr/share/doc/rust-doc/html/{book}/**/*.html" for book in ("book", "reference", "nomicon", "cargo")
        ),
        to_text=html_text,
        excluded=("print.html", "/1st-edition/", "/2018-edition/", "/second-edition/", "/first-edition/"),
    ),
    Source(
        kind="technical",
        package="postgresql-doc-15",
        licence="PostgreSQL",
        patterns=("usr/share/doc/postgresql-doc-15/html/*.html",),
        to_text=html_text,
        excluded=("bookindex", "release-", "biblio", "features-sql"),
    ),
    Source(
        kind="technical",
        package="python3.11-doc",
        licence="PSF-2.0",
        patterns=tuple(
            f"usr/share/doc/python3.11/html/{part}/*.html" for part in ("tutorial", "howto", "reference", "library")
        ),
        to_text=html_text,
        excluded=("/index.html",),
    ),
    Source(
        kind="technical",
        package="git-doc",
        licence="GPL-2.0",
        patterns=("usr/share/doc/git/html/git-*.txt", "usr/share/doc/git/html/g*tutorial*.txt"),
        to_text=plain_text,
        only_heldout=True,
    ),
    *(
        Source(
            kind="quotations",
            package=package,
            licence="BSD-3-Clause (collection)",
            patterns=("usr/share/games/fortunes/*",),
            to_text=fortune_text,
            heldout=("/science", "/work", "/literature", "/people"),
            excluded=(".dat", ".u8", "art", "translate-me"),
            max_chars_per_file=120_000,
        )
        for package in ("fortunes", "fortunes-min")
    ),
    Source(
        kind="source code",
        package="python",
        licence="PSF-2.0",
        patterns=("*.py", "asyncio/*.py", "json/*.py", "email/*.py", "http/*.py", "logging/*.py", "unittest/*.py"),
        to_text=plain_text,
    ),
    *(
        Source(
            kind="dialogue",
            package=f"wesnoth-1.16-{campaign}",
            licence="GPL-2.0-or-later",
            patterns=(_CAMPAIGNS,),
            to_text=scenario_text,
            heldout=_HELDOUT_CAMPAIGNS,
        )
        for campaign in ("did", "dm", "ei", "httt", "nr", "sof", "sota", "thot", "trow", "tsg", "utbs")
    ),
    Source(
        kind="dialogue",
        package="pypi:chatterbot-corpus",
        licence="BSD-3-Clause",
        patterns=("chatterbot_corpus/data/english/*.yml",),
        to_text=conversation_text,
        max_chars_per_file=20_000,
    ),
)
