"""The checkpoints that are measured: random weights in Mixtral's shape, made and prepared once, kept in the cache.

Knows shapes and where their stores are; measures nothing.
"""

import hashlib
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from odmoe_model.manifest import FORMAT_VERSION, MANIFEST_FILE
from odmoe_model.random_shape import RandomShape
from odmoe_server import benchmark_model, models, progress

_ATTENTION: Final[dict[str, Any]] = {"heads": 8, "kv_heads": 2, "more": {"head_dim": 64}}
# 6.0 GB, 98 % of it in experts, in as few layers as can be: eight experts in slots, an int8 shadow and what is no
# expert's are still less than a third of it all, and an expert is as large as that allows (41 MB; a token needs two a
# layer), so that messages are as small a part of a layer as they can be.
FULL: Final = RandomShape(family="mixtral", layers=18, hidden=1024, intermediate=3328, vocab=4096, **_ATTENTION)
QUICK: Final = RandomShape(family="mixtral", layers=8, hidden=1024, intermediate=1024, vocab=2048, **_ATTENTION)


def ensure(shape: RandomShape, *, console: Console) -> Path:
    """The prepared store of that shape, made if there is none. Raises ValueError with a message for the user."""
    place = _place(shape)
    if (place / MANIFEST_FILE).is_file():
        return place
    checkpoint = place.with_name(f"{place.name}.checkpoint")
    if not checkpoint.is_dir():
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        benchmark_model.write(shape, checkpoint, seed=0, console=console)
    with progress.shown(console) as tell:
        models.make_store(str(checkpoint), place, progress=tell)
    _remove(checkpoint)
    return place


def _place(shape: RandomShape) -> Path:
    digest = hashlib.sha256(f"{FORMAT_VERSION} {shape}".encode()).hexdigest()[:12]
    name = f"bench-{shape.family}-{shape.layers}x{shape.hidden}x{shape.intermediate}"
    return models.cache_dir() / f"{name}-{digest}"


def _remove(checkpoint: Path) -> None:
    """The store has all of it; the files alone, and only what was written here."""
    for file in checkpoint.iterdir():
        file.unlink()
    checkpoint.rmdir()
