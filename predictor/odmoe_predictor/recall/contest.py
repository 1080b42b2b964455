"""Rivals of the shadow told, token by token and layer by layer, what the full model did. Knows no rival by name.

A forecast counts when it is there as the layer's gate speaks. Sequences follow one another.

Shape suffixes: as in `lockstep`; N token index in the answer.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from odmoe_predictor.recall.record import Record
from odmoe_predictor.recall.tally import Tally
from odmoe_predictor.rivals.base import Rival
from odmoe_predictor.rivals.examples import Tokens


@dataclass(frozen=True, kw_only=True)
class Contest:
    """`covered` is the share of layers, over all tokens, for which there was a forecast at all; `bytes` what the
    rival held after its last token."""

    tally: Tally
    covered: float
    bytes: int


@torch.inference_mode()
def contest(rival: Rival, record: Record, *, on_done: Callable[[], None] = lambda: None) -> Contest:
    """Measure a rival on a record, which must have the gates' inputs if it wants them. `on_done` is called after
    each sequence."""
    routed_NbLK: list[list[list[list[int]]]] = [step.routed_LbK.transpose(0, 1).tolist() for step in record.steps]
    hits_N, covered, held_bytes = [0] * len(record.steps), 0, 0
    for sequence in range(len(record.prompts)):
        rival.begin(sequence)
        for index, place in tokens_of(record, sequence):
            forecasts = dict(rival.on_token(sequence))
            for layer, experts in enumerate(routed_NbLK[index][place]):
                forecast = forecasts.get(layer, [])
                hits_N[index] += len(set(forecast) & set(experts))
                covered += bool(forecast)
                x_1H = record.steps[index].inputs_LbH[layer][place, None] if rival.wants == "inputs" else None
                forecasts |= rival.on_routed(sequence, layer, experts, x_1H)
        held_bytes = max(held_bytes, rival.held_bytes)
        rival.end(sequence)
        on_done()
    tally = Tally(hits_N=hits_N, alive_N=record.num_alive, num_needed=record.num_needed)
    num_layers = record.steps[0].routed_LbK.shape[0]
    return Contest(tally=tally, covered=covered / (num_layers * sum(record.num_alive)), bytes=held_bytes)


def tokens_of(record: Record, sequence: int) -> Iterator[tuple[int, int]]:
    """(step, place in its batch) of each token of an answer."""
    for index, step in enumerate(record.steps):
        place_1 = (step.rows_b == sequence).nonzero().flatten().tolist()
        if not place_1 or not step.alive_b[place_1[0]]:
            return
        yield index, place_1[0]


def training_tokens(record: Record) -> Tokens:
    """The record as examples for the trained rival."""
    rows: list[Tensor] = []
    before: list[int] = []
    for sequence in range(len(record.prompts)):
        for index, place in tokens_of(record, sequence):
            before.append(len(rows) - 1 if index else -1)
            rows.append(record.steps[index].routed_LbK[:, place])
    return Tokens(torch.stack(rows), torch.tensor(before))
