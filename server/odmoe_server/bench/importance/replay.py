"""One model's part of `odmoe bench importance` that needs no server: hit rates, bytes and quality of all arms.

Run as a module, a process for each model, with a job as JSON on standard input; writes what it found as JSON to
standard output and a line a tenth of the work to standard error.
"""

import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import msgspec
import torch
from torch import Tensor

from odmoe_model.manifest import Manifest
from odmoe_model.skeleton import load_tokenizer
from odmoe_model.store import ExpertStore
from odmoe_server.bench.importance import likeness, passages, tasks
from odmoe_server.bench.importance.arms import ABLATION, ALPHAS, FEW_ALPHAS, GOAL_SHARE, IMPORTANCE, LRU, arms
from odmoe_server.bench.importance.device import Times
from odmoe_server.bench.importance.fleet import Arm, Fleet
from odmoe_server.bench.importance.lanes import LaneModel
from odmoe_server.bench.importance.questions import QUESTIONS
from odmoe_server.bench.importance.rows import Row, add_quality, compare, replayed_row
from odmoe_server.bench.importance.texts import TEXTS
from odmoe_server.bench.resident import load_resident, share
from odmoe_wire.lifeline import end_with_parent

SIDE_BY_SIDE: Final = 3
PROMPT_TOKENS: Final = 16
# Of the last texts likeness is learned; quality is measured on the others.
LEARNING_TEXTS: Final = 3
_TIMED_TOKENS: Final = 16
_DRAWN_TOKENS: Final = 160
_TOLD: Final = 10


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """`tokens` of each of `texts` texts are decoded. `speaks`: the model was trained, so that quality means something.
    `load_ratio`: how many times a layer's computation its chosen experts take on the link, one after the other;
    `host_ratio`: how many times a load an expert takes on the host. `only`: an alpha and a share of slots, to measure
    importance at nothing else, beside LRU."""

    store: str
    name: str
    speaks: bool
    tokens: int
    texts: int
    questions: int
    quick: bool = False
    only: tuple[float, float] | None = None
    load_ratio: float
    host_ratio: float


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """The rows, and what they were computed from."""

    rows: list[Row]
    times: dict[str, float]
    tokens: int
    shape: dict[str, Any]


def run(job: Job, *, tell: Callable[[str], None]) -> Found:
    """The whole of it."""
    store = ExpertStore.open(Path(job.store), verify=False)
    manifest, tokenizer = store.manifest, load_tokenizer(store)
    times = _times(store, tokenizer, job)
    model = LaneModel(store)
    ids = [tokenizer(text)["input_ids"] for text in TEXTS] if job.speaks else drawn_texts(tokenizer.vocab_size)
    make = _Fleets(manifest, times, normalised=model.normalised)
    rows = _read(model, make, job, ids, _arms(model, manifest, job, ids), tell=tell)
    if job.questions:
        _ask(model, make, job, rows, tokenizer, tell=tell)
    compare(list(rows.values()))
    return Found(rows=list(rows.values()), times=asdict(times), tokens=job.tokens * job.texts, shape=_shape(manifest))


def _arms(model: LaneModel, manifest: Manifest, job: Job, ids: Sequence[Sequence[int]]) -> list[Arm]:
    if job.only is not None:
        alpha, share_of_slots = job.only
        return [
            Arm(policy=LRU, slots_share=share_of_slots, batch=1, alpha=0.0, features=ABLATION[LRU]),
            Arm(policy=IMPORTANCE, slots_share=share_of_slots, batch=1, alpha=alpha, features=ABLATION[IMPORTANCE]),
        ]
    mean_LEE = likeness.learn(
        model,
        [torch.tensor(tokens[: PROMPT_TOKENS + job.tokens]) for tokens in ids[-LEARNING_TEXTS:]],
        num_layers=manifest.num_moe_layers,
        num_experts=manifest.num_experts,
    )
    return arms(batches=(1, SIDE_BY_SIDE), quick=job.quick, like=likeness.by_distance(mean_LEE))


class _Fleets:
    def __init__(self, manifest: Manifest, times: Times, *, normalised: bool) -> None:
        self.manifest, self._times, self._normalised = manifest, times, normalised

    def __call__(self, chosen: Sequence[Arm], *, num_texts: int) -> Fleet:
        return Fleet(
            chosen,
            num_texts=num_texts,
            num_layers=self.manifest.num_moe_layers,
            num_experts=self.manifest.num_experts,
            times=self._times,
            normalised=self._normalised,
        )


def drawn_texts(vocab_size: int) -> list[list[int]]:
    """For a model that was never trained: tokens as often as words are in a language, by Zipf's law."""
    generator = torch.Generator().manual_seed(0)
    weights_V = 1 / torch.arange(1, vocab_size + 1, dtype=torch.float64)
    return [torch.multinomial(weights_V, _DRAWN_TOKENS, replacement=True, generator=generator).tolist() for _ in TEXTS]


def _times(store: ExpertStore, tokenizer: Any, job: Job) -> Times:
    """Measured: a layer's own part and one expert. A load is so many times a layer, the host so many times a load."""
    top_k = store.manifest.top_k
    prompt = tokenizer(TEXTS[0])["input_ids"][:PROMPT_TOKENS]
    main_s, expert_s = share(load_resident(store), prompt, tokens=_TIMED_TOKENS, top_k=top_k)
    load_s = job.load_ratio * (main_s + top_k * expert_s) / top_k
    return Times(main_s=main_s, expert_s=expert_s, load_s=load_s, host_s=job.host_ratio * load_s)


def _read(
    model: LaneModel,
    make: _Fleets,
    job: Job,
    ids: Sequence[Sequence[int]],
    chosen: Sequence[Arm],
    *,
    tell: Callable[[str], None],
) -> dict[Arm, Row]:
    fleet, manifest = make(chosen, num_texts=SIDE_BY_SIDE), make.manifest
    end = PROMPT_TOKENS + job.tokens + 1
    groups: list[Tensor] = [
        torch.tensor([tokens[:end] for tokens in ids[first : first + SIDE_BY_SIDE]])
        for first in range(0, job.texts, SIDE_BY_SIDE)
    ]
    on_step = _told(tell, f"{job.name}: reading", steps=len(groups) * job.tokens)
    heard = passages.read(model, fleet, groups, prompt_tokens=PROMPT_TOKENS, on_step=on_step)
    counts = fleet.counts()
    rows = {}
    for arm in chosen:
        rows[arm] = replayed_row(
            job.name,
            arm,
            counts[arm],
            record_bytes=manifest.record_bytes,
            num_experts=manifest.num_moe_layers * manifest.num_experts,
        )
        if job.speaks:
            lanes = fleet.lanes_of[arm]
            add_quality(
                rows[arm],
                [loss for lane in lanes for loss in heard.losses[lane]],
                [loss for lane in range(SIDE_BY_SIDE) for loss in heard.losses[lane]],
                agreed=sum(heard.agreed[lane] for lane in lanes),
            )
    return rows


def _ask(
    model: LaneModel,
    make: _Fleets,
    job: Job,
    rows: dict[Arm, Row],
    tokenizer: Any,
    *,
    tell: Callable[[str], None],
) -> None:
    """The questions, at the goal's share of slots and a batch of one."""
    alphas = FEW_ALPHAS if job.quick else ALPHAS
    features = ABLATION[IMPORTANCE]
    asked = [
        Arm(policy=LRU, slots_share=GOAL_SHARE, batch=1, alpha=0.0, features=ABLATION[LRU]),
        *(Arm(policy=IMPORTANCE, slots_share=GOAL_SHARE, batch=1, alpha=alpha, features=features) for alpha in alphas),
    ]
    questions = QUESTIONS[:: max(1, len(QUESTIONS) // job.questions)]
    on_done = _told(tell, f"{job.name}: questions", steps=len(questions))
    found = tasks.answer(model, make(asked, num_texts=1), questions, tokenizer=tokenizer, on_done=on_done)
    for arm, right in found.items():
        rows[arm].tasks_right, rows[arm].tasks = sum(right), len(right)


def _shape(manifest: Manifest) -> dict[str, Any]:
    return {
        "family": manifest.model_type,
        "layers": manifest.num_moe_layers,
        "experts": manifest.num_experts,
        "top_k": manifest.top_k,
        "expert_bytes": manifest.record_bytes,
        "digest": manifest.digest,
    }


def _told(tell: Callable[[str], None], what: str, *, steps: int) -> Callable[[], None]:
    done = 0

    def on_step() -> None:
        nonlocal done
        done += 1
        if done * _TOLD // steps > (done - 1) * _TOLD // steps:
            tell(f"{what}, {100 * done // steps} %")

    return on_step


def main() -> None:
    """Do the job on standard input."""
    end_with_parent(signal.SIGTERM)
    torch.set_num_threads(1)
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    found = run(job, tell=lambda text: print(text, file=sys.stderr, flush=True))
    sys.stdout.buffer.write(msgspec.json.encode(found))


if __name__ == "__main__":
    main()
