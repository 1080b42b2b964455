"""Logits to the next token. Knows transformers' logits processors; knows no model and no text.

B sequences, V vocabulary.
"""

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from odmoe_server.engine_api import Sampling


class Sampler:
    """Chooses the tokens of one sequence. With a seed, or greedy, the same logits give the same tokens whatever
    else the server does: each sequence draws from a generator of its own."""

    def __init__(self, sampling: Sampling) -> None:
        self._greedy = sampling.temperature == 0.0
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)
        self._warpers = LogitsProcessorList()
        if not self._greedy and sampling.temperature != 1.0:
            self._warpers.append(TemperatureLogitsWarper(sampling.temperature))
        if not self._greedy and sampling.top_p < 1.0:
            self._warpers.append(TopPLogitsWarper(sampling.top_p))

    def next_token(self, logits_V: torch.Tensor) -> int:
        """The next token id. Works in float32 on the CPU, as transformers' `generate` does."""
        scores_V = logits_V.to("cpu", torch.float32)
        if self._greedy:
            return int(scores_V.argmax())
        # The warpers we use do not look at the tokens so far.
        no_ids = torch.empty((1, 0), dtype=torch.long)
        scores_BV = self._warpers(no_ids, scores_V.unsqueeze(0))
        probs_V = scores_BV[0].softmax(dim=-1)
        return int(torch.multinomial(probs_V, 1, generator=self._generator))
