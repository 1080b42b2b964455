"""Which of the running sequences the next step takes, and with how many guesses. Pure.

A step is all prompts or all answers, in turns while there are both: so a long prompt holds up the answers that run by
no more than one chunk at a time, and they hold it up by one token.
"""

from collections.abc import Sequence as Batch
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

# Most lanes of a step that guesses may fill up to; beyond it, each further expert costs more than a guess is worth.
MOST_LANES: Final = 16


class Runs(Protocol):
    """What the rota looks at."""

    fresh_ids: list[int]

    @property
    def is_prompt(self) -> bool:
        """Whether the next step takes tokens of its prompt."""
        ...


S = TypeVar("S", bound=Runs)


@dataclass(kw_only=True)
class Rota:
    """`chunk`: most tokens of prompts in one step, but one chunk of the first always; None: prompts go one by one.
    `draft`: most guesses for each sequence."""

    chunk: int | None
    draft: int = 0
    _was_prompt: bool = False

    def next_batch(self, running: Batch[S]) -> list[S]:
        """In the order they came; empty if nobody runs."""
        prompts = [sequence for sequence in running if sequence.is_prompt]
        answers = [sequence for sequence in running if not sequence.is_prompt]
        self._was_prompt = bool(prompts) and not (answers and self._was_prompt)
        return self._together(prompts) if self._was_prompt else answers

    def num_drafts(self, num_answers: int) -> int:
        """For each of the answers of a step."""
        return max(0, min(self.draft, MOST_LANES // max(1, num_answers) - 1))

    def _together(self, prompts: list[S]) -> list[S]:
        batch, room = [prompts[0]], (self.chunk or 0) - len(prompts[0].fresh_ids)
        for sequence in prompts[1:]:
            if len(sequence.fresh_ids) <= room:
                batch.append(sequence)
                room -= len(sequence.fresh_ids)
        return batch
