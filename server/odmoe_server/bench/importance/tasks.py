"""The questions, answered greedily through a fleet: how many each arm has right. Slots stay from one to the next.

Shape suffixes: B lanes, P tokens of a prompt.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from odmoe_server.bench.importance.fleet import Arm, Fleet
from odmoe_server.bench.importance.lanes import LaneModel, as_gated
from odmoe_server.bench.importance.questions import Question, is_right

ANSWER_TOKENS = 24


def answer(
    model: LaneModel,
    fleet: Fleet,
    questions: Sequence[Question],
    *,
    tokenizer: Any,
    on_done: Callable[[], None] = lambda: None,
) -> dict[Arm, list[bool]]:
    """For each arm of a fleet of one text, whether its answers are right."""
    right: dict[Arm, list[bool]] = {arm: [] for arm in fleet.lanes_of}
    for question in questions:
        chat = [{"role": "user", "content": question.text}]
        ids: list[int] = list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))
        texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in _lanes(model, fleet, ids, tokenizer)]
        for arm, lanes in fleet.lanes_of.items():
            right[arm].append(is_right(question, texts[lanes.start]))
        on_done()
    model.decide = as_gated
    return right


@torch.inference_mode()
def _lanes(model: LaneModel, fleet: Fleet, prompt: Sequence[int], tokenizer: Any) -> list[list[int]]:
    """Each lane's answer, up to and with its end."""
    model.decide = fleet.prompt
    cache = model.prompt(torch.tensor([prompt[:-1]]))
    cache.batch_select_indices(torch.zeros(fleet.num_lanes, dtype=torch.int64))
    model.decide = fleet.decide
    next_B = torch.full((fleet.num_lanes,), prompt[-1])
    said: list[list[int]] = [[] for _ in range(fleet.num_lanes)]
    for _ in range(ANSWER_TOKENS):
        next_B = model.step(next_B, cache).argmax(dim=-1)
        for tokens, token in zip(said, next_B.tolist(), strict=True):
            if not tokens or tokens[-1] != tokenizer.eos_token_id:
                tokens.append(token)
        if all(tokens[-1] == tokenizer.eos_token_id for tokens in said):
            break
    return said
