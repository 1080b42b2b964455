"""Makes a random checkpoint at the terminal's wish: reads what was asked for, says the size, shows progress.

Knows the command line's words; what a checkpoint is made of is `odmoe_model.random_checkpoint`'s business.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from odmoe_model.random_checkpoint import RandomCheckpoint
from odmoe_model.random_shape import RandomCheckpointError, RandomShape
from odmoe_server import progress


def shape_of(*, family: str, dtype: str, numbers: Mapping[str, int | None], more: Sequence[str]) -> RandomShape:
    """The shape that `numbers` (by `RandomShape`'s names) and NAME=JSON settings ask for. Raises
    RandomCheckpointError."""
    given: dict[str, Any] = {name: number for name, number in numbers.items() if number is not None}
    return RandomShape(family=family, dtype=_dtype(dtype), more=dict(_setting(text) for text in more), **given)


def write(shape: RandomShape, destination: Path, *, seed: int, console: Console) -> None:
    """Write the checkpoint; its size is said before. Raises RandomCheckpointError."""
    plan = RandomCheckpoint(shape, seed=seed)
    console.print(
        f"{shape.family}, {shape.layers} layers, {shape.experts} experts, top-{shape.top_k}, {shape.dtype}: "
        f"{plan.num_parameters / 1e6:.1f} million parameters, {plan.total_bytes / 1e9:.2f} GB, "
        f"{plan.expert_bytes / plan.total_bytes:.1%} of it in experts",
        highlight=False,
        soft_wrap=True,
    )
    with progress.shown(console) as tell:
        plan.write(destination, progress=lambda what, done_bytes, total_bytes: tell(what, done_bytes / total_bytes))


def _dtype(name: str) -> Literal["fp32", "bf16"]:
    match name:
        case "fp32" | "bf16":
            return name
        case _:
            raise RandomCheckpointError(f"--dtype is fp32 or bf16, not {name!r}")


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise RandomCheckpointError(f"--set takes NAME=JSON, not {text!r}")
    try:
        return name.strip(), json.loads(value)
    except ValueError as error:
        raise RandomCheckpointError(f"--set {name}: {value!r} is no JSON (texts stand in double quotes)") from error
