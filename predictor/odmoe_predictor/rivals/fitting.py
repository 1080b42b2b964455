"""Traces in, a fitted model out, and what it is worth. Knows no options and no output file.

N tokens, L layers, K experts a token, B examples, E experts.
"""

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Final

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from odmoe_model.trace import TraceError, TraceHeader, TraceReader
from odmoe_predictor.rivals.base import Shape
from odmoe_predictor.rivals.examples import Tokens, inputs_of, joined, tokens_of
from odmoe_predictor.rivals.trained import ExpertScores

BATCH: Final = 512
MIN_TOKENS: Final = 20
LEARNING_RATE: Final = 3e-3
WEIGHT_DECAY: Final = 0.01


def read(paths: Sequence[Path]) -> tuple[Tokens, TraceHeader]:
    """The tokens of all traces, which must be of one model, and the first one's header. Raises TraceError, OSError."""
    readers = [TraceReader.open(path) for path in paths]
    header = readers[0].header
    for reader in readers:
        if reader.header.store_digest != header.store_digest or shape_of(reader.header) != shape_of(header):
            raise TraceError(f"{paths[0]} and {reader.path} are traces of two models")
    tokens = joined([tokens_of(reader.steps(), shape_of(header)) for reader in readers])
    if len(tokens) < MIN_TOKENS:
        raise TraceError(f"{len(tokens)} whole tokens in the traces are too few to learn from, at least {MIN_TOKENS}")
    return tokens, header


def shape_of(header: TraceHeader) -> Shape:
    """The shape of the model a trace is of."""
    return Shape(num_layers=header.num_layers, num_experts=header.num_experts, top_k=header.top_k)


def fit(model: ExpertScores, tokens: Tokens, *, epochs: int, console: Console | None = None) -> None:
    """Train on every layer of every token once an epoch, in an order torch's seed decides."""
    shape = model.shape
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    num_examples = len(tokens) * shape.num_layers
    num_steps = epochs * ceil(num_examples / BATCH)
    steps = (order_B for _ in range(epochs) for order_B in torch.split(torch.randperm(num_examples), BATCH))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=num_steps)
    model.train()
    for order_B in track(steps, total=num_steps, description="training", console=console, disable=console is None):
        token_B, layer_B = order_B // shape.num_layers, order_B % shape.num_layers
        scores_BE = model(inputs_of(model, tokens, token_B, layer_B), layer_B)
        chosen_BK = tokens.experts_NLK[token_B, layer_B]
        target_BE = torch.zeros_like(scores_BE).scatter_(1, chosen_BK, 1.0 / shape.top_k)
        loss = torch.nn.functional.cross_entropy(scores_BE, target_BE)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    model.eval()


@torch.inference_mode()
def recall(model: ExpertScores, tokens: Tokens) -> float:
    """Correctly forecast experts over chosen ones, of all layers of the tokens."""
    shape = model.shape
    found = 0
    for order_B in torch.split(torch.arange(len(tokens) * shape.num_layers), BATCH):
        token_B, layer_B = order_B // shape.num_layers, order_B % shape.num_layers
        scores_BE = model(inputs_of(model, tokens, token_B, layer_B), layer_B)
        found += _found(scores_BE.topk(shape.top_k).indices, tokens.experts_NLK[token_B, layer_B])
    return found / tokens.experts_NLK.numel()


def recall_of_the_most_frequent(seen: Tokens, tokens: Tokens, shape: Shape) -> float:
    """The same of a forecast of each layer's most frequent experts among the tokens seen."""
    found = 0
    for layer in range(shape.num_layers):
        counts_E = seen.experts_NLK[:, layer].flatten().bincount(minlength=shape.num_experts)
        best_K = counts_E.topk(shape.top_k).indices
        chosen_NK = tokens.experts_NLK[:, layer]
        found += _found(best_K.expand_as(chosen_NK), chosen_NK)
    return found / tokens.experts_NLK.numel()


def _found(forecast_BK: Tensor, chosen_BK: Tensor) -> int:
    return int((forecast_BK[:, :, None] == chosen_BK[:, None, :]).sum())
