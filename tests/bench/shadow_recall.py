"""Recall, bytes and time of the shadow at each precision and scope, aligned with token and KV at every step.

    PYTHONPATH=tests python -m bench.shadow_recall STORE --tokens 64

The full model answers each prompt once, greedily; then each shadow is fed with the full model's tokens, keys and values
and asked, before every token, which experts it will need. Knows no wire: `Shadow` and the full model in one process.
"""

import argparse
import gc
import json
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import get_args

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from odmoe_model.skeleton import load_tokenizer
from odmoe_model.store import ExpertStore
from odmoe_predictor.config import Precision, Scope
from odmoe_predictor.process import QUANTIZERS
from odmoe_predictor.shadow import Shadow
from odmoe_wire.messages import CacheLayer
from support.predictor_plain import FullModel, Routings, recall

PROMPTS = (
    "Explain in a few sentences why the sky is blue.",
    "Write a short story about a lighthouse keeper and a lost ship.",
    "How do I sort a list of numbers in Python? Show an example.",
    "What should I pack for a week in the mountains?",
)


@dataclass(frozen=True)
class Step:
    """What the full model did with `token`, and what of its cache the shadow lacked before it."""

    position: int
    token: int
    layers: list[CacheLayer]
    tensors: list[Tensor]
    needed: Routings
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table. `recall` as the paper has it: right experts over all experts needed. `bytes` are measured
    on what is in memory, caches left out; `to_fp32` are those of the quantised weights over what they had in fp32."""

    predictor: str = "shadow"
    precision: Precision
    scope: Scope
    align_token: int = 1
    align_kv: int = 1
    run_ahead: int = 0
    recall: float
    tokens: int
    bytes: int
    to_fp32: float
    ms_per_step: float


def answers(store: ExpertStore, prompts: Iterable[Sequence[int]], *, tokens: int) -> list[list[Step]]:
    """The full model's greedy answers, of at most `tokens` tokens each; fewer where it stops."""
    return [list(_answer(FullModel(store), prompt, tokens=tokens, stops=_stops(store))) for prompt in prompts]


def _answer(full: FullModel, prompt: Sequence[int], *, tokens: int, stops: set[int]) -> Iterator[Step]:
    token, rows = full.step(list(prompt)), len(prompt)
    for _ in range(tokens):
        if token in stops:
            return
        position, (layers, tensors) = full.length, full.export(rows)
        began_s = perf_counter()
        following = full.step([token])
        yield Step(position, token, layers, tensors, full.routings, perf_counter() - began_s)
        token, rows = following, 1


def measure(store: ExpertStore, recorded: list[list[Step]], *, precision: Precision, scope: Scope) -> Row:
    """Load that shadow and replay the answers to it."""
    shadow = Shadow.load(store, quantize=QUANTIZERS[precision], scope=scope)
    recalls, seconds = [], []
    for sequence, steps in enumerate(recorded):
        shadow.start(sequence)
        for step in steps:
            shadow.align(
                sequence, position=step.position, tokens=[step.token], layers=step.layers, tensors=step.tensors
            )
            forecast: Routings = {}
            began_s = perf_counter()
            shadow.forecast(sequence, on_routing=forecast.__setitem__)
            seconds.append(perf_counter() - began_s)
            recalls.append(recall(forecast, step.needed))
        shadow.end(sequence)
    return Row(
        precision=precision,
        scope=scope,
        # Every step needs equally many experts, so that the mean is the share of all of them.
        recall=statistics.fmean(recalls),
        tokens=len(recalls),
        bytes=shadow.report.held_bytes,
        to_fp32=shadow.report.ratio_to_fp32(),
        ms_per_step=1e3 * statistics.median(seconds),
    )


def table(rows: Sequence[Row], *, full_ms: float) -> Table:
    """The rows for people."""
    title = f"the shadow, aligned every step, {rows[0].tokens} tokens; a step of the full model takes {full_ms:.1f} ms"
    drawn = Table(title=title, title_justify="left")
    for column in ("precision", "scope"):
        drawn.add_column(column)
    for column in ("recall, %", "held, MB", "of fp32, %", "ms per step"):
        drawn.add_column(column, justify="right")
    for row in rows:
        figures = f"{100 * row.recall:.2f}", f"{row.bytes / 1e6:.1f}", f"{100 * row.to_fp32:.1f}"
        drawn.add_row(row.precision, row.scope, *figures, f"{row.ms_per_step:.1f}")
    return drawn


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    options = _options(argv)
    torch.set_num_threads(options.threads)
    store = ExpertStore.open(options.store, verify=False)
    prompts = [options.token_ids] if options.token_ids else _encoded(store, options.prompt or PROMPTS)
    recorded = answers(store, prompts, tokens=options.tokens)
    steps = [step for answer in recorded for step in answer]
    if not steps:
        raise SystemExit("the model had nothing to say to these prompts")
    rows = []
    for precision, scope in product(options.precision, options.scope):
        rows.append(measure(store, recorded, precision=precision, scope=scope))
        print(rows[-1], file=sys.stderr, flush=True)
        gc.collect()  # a shadow and its model hold one another, and the next one needs the room
    Console(width=100).print(table(rows, full_ms=1e3 * statistics.median(step.seconds for step in steps)))
    if options.json:
        options.json.write_text(json.dumps({"rows": [asdict(row) for row in rows]}, indent=2), encoding="utf-8")


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("store", type=Path, help="prepared store (odmoe prepare)")
    parser.add_argument("--precision", nargs="+", choices=get_args(Precision), default=get_args(Precision))
    parser.add_argument("--scope", nargs="+", choices=get_args(Scope), default=get_args(Scope))
    parser.add_argument("--tokens", type=int, default=64, help="of each answer, at most")
    parser.add_argument("--prompt", action="append", help="in place of the built-in prompts; may be repeated")
    parser.add_argument("--token-ids", type=int, nargs="+", help="one prompt as ids, for models without a tokenizer")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the rows there too")
    return parser.parse_args(argv)


def _encoded(store: ExpertStore, prompts: Iterable[str]) -> list[list[int]]:
    tokenizer = load_tokenizer(store)
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in chats]


def _stops(store: ExpertStore) -> set[int]:
    stop = store.manifest.config.get("eos_token_id")
    return set(stop) if isinstance(stop, list) else {stop}


if __name__ == "__main__":
    main()
