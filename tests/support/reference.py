"""What transformers itself says: the reference of every test of exactness."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel


def reference_tokens(checkpoint: Path, prompt_ids: Sequence[int], num_tokens: int) -> list[int]:
    """Greedy tokens of `generate` with eager experts, end tokens ignored."""
    return greedy_tokens(reference_model(checkpoint), prompt_ids, num_tokens)


def reference_model(checkpoint: Path) -> PreTrainedModel:
    """The model with eager experts, for a test that asks it more than once."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.set_experts_implementation("eager")
    return model


def greedy_tokens(model: PreTrainedModel, prompt_ids: Sequence[int], num_tokens: int) -> list[int]:
    """Greedy tokens of `generate`, end tokens ignored."""
    ids_BT = torch.tensor([list(prompt_ids)])
    out_BT = model.generate(
        ids_BT,
        attention_mask=torch.ones_like(ids_BT),
        max_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    tokens: list[int] = out_BT[0, len(prompt_ids) :].tolist()
    return tokens
