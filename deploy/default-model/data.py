"""Token sequences for training and evaluation from the collected texts.

Knows the files that `collect_text` and `generate_chat` write. Does not know losses or models.

Dimensions: N sequences, L tokens of a sequence.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

TEXT_KINDS = ("technical", "quotations", "source-code", "dialogue")
CHAT = "chat"
IGNORED = -100  # the target of a position that has no loss


@dataclass(frozen=True)
class Sequences:
    """Input tokens and next-token targets, all of one length; padding has the target IGNORED."""

    tokens_NL: Tensor
    targets_NL: Tensor

    def __len__(self) -> int:
        return len(self.tokens_NL)


def load_text(path: Path, tokenizer: PreTrainedTokenizerBase, *, length: int, limit: int, seed: int) -> Sequences:
    """Windows of `length` tokens from files in random order; at most `limit` of them."""
    rng = random.Random(seed)
    windows: list[list[int]] = []
    texts = [json.loads(line)["text"] for line in path.open(encoding="utf-8")]
    # Windows of many files rather than many windows of few: cut first, draw then.
    pieces = [text[i : i + 4 * length] for text in texts for i in range(0, max(1, len(text) - 400), 4 * length)]
    rng.shuffle(pieces)
    for piece in pieces:
        ids = tokenizer(piece)["input_ids"]
        if len(ids) > length // 2:
            windows.append(ids[: length + 1])
        if len(windows) == limit:
            break
    return _padded(windows, length=length, answers_from=[0] * len(windows))


def load_chat(path: Path, tokenizer: PreTrainedTokenizerBase, *, length: int) -> Sequences:
    """Whole conversations; only the answer's tokens are targets."""
    texts = [json.loads(line)["text"] for line in path.open(encoding="utf-8")]
    marker = "<|im_start|>assistant\n"
    starts = [len(tokenizer(text[: text.index(marker) + len(marker)])["input_ids"]) - 1 for text in texts]
    ids = [tokenizer(text)["input_ids"][: length + 1] for text in texts]
    return _padded(ids, length=length, answers_from=starts)


def _padded(windows: list[list[int]], *, length: int, answers_from: list[int]) -> Sequences:
    tokens_NL = torch.full((len(windows), length), 2)
    targets_NL = torch.full((len(windows), length), IGNORED)
    for n, (ids, start) in enumerate(zip(windows, answers_from, strict=True)):
        tokens_NL[n, : len(ids) - 1] = torch.tensor(ids[:-1])
        targets_NL[n, start : len(ids) - 1] = torch.tensor(ids[start + 1 :])
    return Sequences(tokens_NL=tokens_NL, targets_NL=targets_NL)
