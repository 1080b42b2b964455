"""The whole of `odmoe bench importance`: every model replayed, each in a process of its own, then one of them served.

Starts and collects; what the figures mean is decided in `rows`.
"""

import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec
from rich.console import Console

from odmoe_model.random_shape import RandomShape
from odmoe_server import launch
from odmoe_server.bench import model as models
from odmoe_server.bench.importance import served
from odmoe_server.bench.importance.questions import QUESTIONS
from odmoe_server.bench.importance.replay import Found, Job
from odmoe_server.bench.importance.rows import Row
from odmoe_server.launch_plan import environment

# 1024 experts; logits of its gates have a deviation of about 1, as all activations of random checkpoints.
FINE: Final = RandomShape(
    family="qwen2_moe",
    layers=16,
    experts=64,
    top_k=8,
    hidden=512,
    intermediate=128,
    vocab=2048,
    dtype="bf16",
    heads=8,
    kv_heads=2,
)
DEFAULT: Final = "default"
PARTITIONED: Final = "partitioned"
FINE_NAME: Final = "fine-grained random"
MODELS: Final = (DEFAULT, PARTITIONED, FINE_NAME)
# As in `odmoe bench decode`, where a layer's experts come over as many links side by side.
LOAD_RATIO: Final = 4.4
# Of Qwen2-57B in the SMoE authors' notes: 2.4 ms for an expert on the host, 2 ms for its load.
HOST_RATIO: Final = 1.2
REPLAY_S: Final = 3600.0
_SIDE_BY_SIDE: Final = 2
_LAST_WORDS: Final = 20


class ImportanceError(ValueError):
    """Something could not be measured; the message says what happened."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """`replayed` by the models' names; `served` rows of one of them, none where nothing was served."""

    replayed: dict[str, Found]
    served: list[Row] = field(default_factory=list)
    served_facts: dict[str, object] = field(default_factory=dict)

    @property
    def rows(self) -> list[Row]:
        return [*self.served, *(row for found in self.replayed.values() for row in found.rows)]

    @property
    def is_exact(self) -> bool:
        """Whether the answers served at alpha 0 were those of LRU; true where nothing was served."""
        return bool(self.served_facts.get("exact_at_alpha_0", True))


def measure(*, quick: bool, serve: bool, console: Console) -> Findings:
    """Everything: all models replayed, then the first of them served. Raises ValueError with a message for the user."""
    found = replay(MODELS, quick=quick, console=console)
    if not serve:
        return Findings(replayed=found)
    name = MODELS[0]
    times, top_k = found[name].times, found[name].shape["top_k"]
    rows, facts = served.serve_and_time(
        store_of(name, console=console),
        name,
        layer_s=times["main_s"] + top_k * times["expert_s"],
        load_ratio=LOAD_RATIO,
        quick=quick,
        tell=_teller(console),
    )
    return Findings(replayed=found, served=rows, served_facts=facts)


def store_of(name: str, *, console: Console) -> Path:
    """The store of one of `MODELS`, made if there is none, or of a path. Raises ValueError."""
    return models.ensure(FINE, console=console) if name == FINE_NAME else launch.ensure_store(name)


def replay(names: Sequence[str], *, quick: bool, console: Console) -> dict[str, Found]:
    """Every model, two at a time. Raises ImportanceError."""
    jobs = [_job(name, store_of(name, console=console), quick=quick) for name in names]
    tell = _teller(console)
    with ThreadPoolExecutor(max_workers=_SIDE_BY_SIDE) as pool:
        return dict(zip(names, pool.map(lambda job: replay_job(job, tell), jobs), strict=True))


def _job(name: str, store: Path, *, quick: bool) -> Job:
    return Job(
        store=str(store),
        name=name,
        speaks=name != FINE_NAME,
        tokens=32 if quick else 64,
        texts=3 if quick else 6,
        questions=0 if name == FINE_NAME else 7 if quick else len(QUESTIONS),
        quick=quick,
        load_ratio=LOAD_RATIO,
        host_ratio=HOST_RATIO,
    )


def _teller(console: Console) -> Callable[[str], None]:
    lock = threading.Lock()

    def tell(line: str) -> None:
        with lock:
            console.print(line, highlight=False, soft_wrap=True)

    return tell


def replay_job(job: Job, tell: Callable[[str], None]) -> Found:
    """One model, in a process of its own; `tell` hears how far it is. Raises ImportanceError."""
    command = [sys.executable, "-m", "odmoe_server.bench.importance.replay"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(1)
    ) as process:
        timer = threading.Timer(REPLAY_S, process.kill)
        timer.start()
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdin.write(msgspec.json.encode(job))
            process.stdin.close()
            said = []
            for raw in process.stderr:
                said.append(raw.decode(errors="replace").rstrip())
                if said[-1].startswith(job.name):
                    tell(said[-1])
            found = process.stdout.read()
        except BaseException:
            process.kill()
            raise
        finally:
            timer.cancel()
    if process.returncode != 0:
        raise ImportanceError("\n  ".join([f"replaying {job.name} failed:", *said[-_LAST_WORDS:]]))
    return msgspec.json.decode(found, type=Found)
