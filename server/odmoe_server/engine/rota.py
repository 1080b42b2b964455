"""Which of the running sequences the next step takes, and with how many guesses. Pure.

A step is all prompts or all answers, in turns while there are both. A step with prompts may be left behind any layer
and taken up again, so it holds up the answers that run by no more than a step or two of theirs at a time; they hold it
up by one token.
"""

from collections.abc import Sequence as Batch
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

# Most lanes of a step that guesses may fill up to; beyond it, each further expert costs more than a guess is worth.
MOST_LANES: Final = 16
# So many chunks of tokens, of prompts that are there together, go through the model in one step: each is cut as it is
# alone, but they share what is loaded, and their answers begin, and then go on, together. Of eight prompts of 16 to 256
# tokens that came at once, with chunks of 256, the last token came after 23.8 to 25.0 s instead of 26.5; half of them
# waited 3 s for their first token instead of 1.4.
CHUNKS_TOGETHER: Final = 4
# Parts of a prompt may last so many times what a step with the answers lasts: their tokens then come at most three
# times as far apart as without a prompt, with something left for what the two take from one another.
MOST_HELD_UP: Final = 1.0
# How much of what a step took counts in the average.
_NEWS: Final = 0.25


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
    """`chunk`: most tokens of one prompt in a step, of all together `CHUNKS_TOGETHER` times as many; None: prompts go
    one by one. `draft`: most guesses for each sequence."""

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
        batch, room = [prompts[0]], CHUNKS_TOGETHER * (self.chunk or 0) - len(prompts[0].fresh_ids)
        for sequence in prompts[1:]:
            if len(sequence.fresh_ids) <= room:
                batch.append(sequence)
                room -= len(sequence.fresh_ids)
        return batch


@dataclass(kw_only=True)
class Patience:
    """How long the answers that run can be held up by a part of a prompt."""

    _step_s: float = 0.0

    def answered(self, took_s: float) -> None:
        """A step with answers took so long."""
        self._step_s += (_NEWS if self._step_s else 1.0) * (took_s - self._step_s)

    def is_over(self, part_s: float, *, num_layers: int) -> bool:
        """Whether one layer more of a prompt's, of which so many took `part_s`, would be too much. Never before there
        was an answer to be held up."""
        return bool(self._step_s) and part_s * (1 + 1 / num_layers) > MOST_HELD_UP * self._step_s
