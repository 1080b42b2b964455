"""Tokens an answer is made of, and words it must not have: constraints of the engine. Knows token ids and transformers'
processor; knows no text and no request.

V vocabulary, T tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import NoBadWordsLogitsProcessor

Allow = Callable[[Sequence[int], Tensor], Tensor]


@dataclass(frozen=True)
class OnlyTokens:
    """Nothing but these. One that ends an answer must be among them, or it ends with its last token."""

    token_ids: tuple[int, ...]

    def start(self) -> Allow:
        """See Constraint."""
        allowed = torch.tensor(self.token_ids)

        def allow(answer_ids: Sequence[int], scores_V: Tensor) -> Tensor:
            bounded_V = torch.full_like(scores_V, -torch.inf)
            bounded_V[allowed] = scores_V[allowed]
            return bounded_V

        return allow


@dataclass(frozen=True)
class NotWords:
    """None of these sequences of tokens; what the prompt ends with does not count."""

    sequences: tuple[tuple[int, ...], ...]

    def start(self) -> Allow:
        """See Constraint."""
        processor = NoBadWordsLogitsProcessor([list(sequence) for sequence in self.sequences])

        def allow(answer_ids: Sequence[int], scores_V: Tensor) -> Tensor:
            # The processor overlooks a sequence that would be as long as all there is, so something stands in front.
            ids_BT = torch.tensor([[-1, *answer_ids]])
            scores: Tensor = processor(ids_BT, scores_V.unsqueeze(0))[0]
            return scores

        return allow
