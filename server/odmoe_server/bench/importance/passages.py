"""Held-out text through all arms of a fleet at once: what each arm's model would have said next, and what that costs.

Every lane is given the text's own next token, whatever it would have said. Knows lanes, not what they stand for.

Shape suffixes: S texts side by side, B lanes, P tokens of a text, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from odmoe_server.bench.importance.fleet import Fleet
from odmoe_server.bench.importance.lanes import LaneModel, as_gated


@dataclass(kw_only=True)
class Heard:
    """For each lane the losses of its tokens, and how often its likeliest next token was that of the reference."""

    losses: list[list[float]] = field(default_factory=list)
    agreed: list[int] = field(default_factory=list)


@torch.inference_mode()
def read(
    model: LaneModel,
    fleet: Fleet,
    groups: Sequence[Tensor],
    *,
    prompt_tokens: int,
    on_step: Callable[[], None] = lambda: None,
) -> Heard:
    """Each group is [S, P] tokens: a prompt, then one step a token. Devices keep their slots from group to group."""
    heard = Heard(losses=[[] for _ in range(fleet.num_lanes)], agreed=[0] * fleet.num_lanes)
    for tokens_SP in groups:
        num_texts = tokens_SP.shape[0]
        text_B = torch.arange(num_texts).repeat(fleet.num_lanes // num_texts)
        model.decide = fleet.prompt
        cache = model.prompt(tokens_SP[:, :prompt_tokens])
        cache.batch_select_indices(text_B)
        model.decide = fleet.decide
        for place in range(prompt_tokens, tokens_SP.shape[1] - 1):
            logits_BV = model.step(tokens_SP[text_B, place], cache).float()
            _hear(heard, logits_BV, next_B=tokens_SP[text_B, place + 1], text_B=text_B)
            on_step()
    model.decide = as_gated
    return heard


def _hear(heard: Heard, logits_BV: Tensor, *, next_B: Tensor, text_B: Tensor) -> None:
    loss_B = torch.nn.functional.cross_entropy(logits_BV, next_B, reduction="none")
    likeliest_B = logits_BV.argmax(dim=-1)
    agrees_B = likeliest_B == likeliest_B[text_B]
    for lane, (loss, agrees) in enumerate(zip(loss_B.tolist(), agrees_B.tolist(), strict=True)):
        heard.losses[lane].append(loss)
        heard.agreed[lane] += agrees
