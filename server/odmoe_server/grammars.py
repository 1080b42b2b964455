"""Grammars that an answer must follow, for one tokenizer. Knows llguidance; knows neither HTTP nor tools nor schemas.

llguidance, because it works with any fast tokenizer from its JSON alone, needs no other package (xgrammar brings triton
and a runtime of its own), says of a schema what it cannot enforce in place of ignoring it, and works lazily under a
budget of steps: a grammar made to hurt is refused or ends one answer, within milliseconds (outlines-core builds the
whole automaton first).

V vocabulary.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import anyio
import anyio.to_thread
import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from
from tokenizers import Tokenizer
from torch import Tensor

from odmoe_server.engine_api import GenerationFailed

# Steps of work, not time, so that the same grammar passes or fails on every machine. Half a second and 50 ms at the
# speeds llguidance states.
_LIMITS: Final = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=50_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)
# What compiles beside one another; the rest waits its turn.
_MOST_COMPILING: Final = 2

Allow = Callable[[Sequence[int], Tensor], Tensor]
# What a grammar is written in: as llguidance wants it, or as clients have it, who write Lark's notation or GBNF.
Notation = Literal["llguidance", "regex", "lark or gbnf"]


class GrammarError(ValueError):
    """The grammar cannot be enforced; the message says why."""


class Grammars:
    """Compiles grammars. `end_ids` are the tokens that end an answer; the first use prepares the vocabulary."""

    def __init__(self, tokenizer: Tokenizer, *, end_ids: Sequence[int]) -> None:
        self._source = tokenizer
        self._end_ids = list(end_ids)
        self._few_at_a_time = anyio.CapacityLimiter(_MOST_COMPILING)

    async def compile(
        self, grammar: str, *, trigger: str = "", notation: Notation = "llguidance"
    ) -> "GrammarConstraint":
        """`grammar` from the answer's beginning, or from where `trigger` has been written; up to there everything
        goes. Raises `GrammarError`. Works in a thread, without the interpreter's lock."""
        work = functools.partial(self.compile_now, grammar, trigger=trigger, notation=notation)
        return await anyio.to_thread.run_sync(work, limiter=self._few_at_a_time)

    def compile_now(self, grammar: str, *, trigger: str = "", notation: Notation = "llguidance") -> "GrammarConstraint":
        """`compile`, on the caller's thread."""
        if not self._end_ids:
            raise GrammarError("this model has no token that ends an answer")
        matcher = LLMatcher(self._vocabulary, _rewritten(grammar, notation), limits=_LIMITS, log_level=0)
        trial = matcher.deep_copy()
        if not trial.is_error():
            trial.compute_bitmask()  # what cannot even begin shows here
        if trial.is_error():
            raise GrammarError(_reason(trial))
        return GrammarConstraint(matcher, self._vocabulary, trigger=trigger.encode())

    @functools.cached_property
    def _vocabulary(self) -> LLTokenizer:
        plain = Tokenizer.from_str(self._source.to_str())
        plain.no_padding()
        plain.no_truncation()
        return LLTokenizer(plain.to_str(), eos_token=self._end_ids)


def _rewritten(grammar: str, notation: Notation) -> str:
    """As llguidance wants it."""
    if notation == "llguidance":
        return grammar
    if notation == "regex":
        return str(grammar_from("regex", grammar))
    try:
        # Blank lines mean nothing, and the reader takes very long over many.
        return str(grammar_from("grammar", "\n".join(line for line in grammar.splitlines() if line.strip())))
    except ValueError as error:
        raise GrammarError(str(error).partition("Lark: ")[2] or str(error)) from None


@dataclass(frozen=True)
class GrammarConstraint:
    """A compiled grammar: a `Constraint` of the engine, shared by all choices of a request."""

    matcher: LLMatcher
    vocabulary: LLTokenizer
    trigger: bytes = b""

    def start(self) -> Allow:
        """See Constraint."""
        return _Follower(self.matcher.deep_copy(), self.vocabulary, trigger=self.trigger)


class _Follower:
    """Follows one answer. Before the trigger nothing is forbidden and nothing is computed."""

    def __init__(self, matcher: LLMatcher, vocabulary: LLTokenizer, *, trigger: bytes) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._trigger = trigger
        self._free = bool(trigger)
        self._tail = b""

    def __call__(self, answer_ids: Sequence[int], scores_V: Tensor) -> Tensor:
        """scores_V with what the grammar forbids behind `answer_ids` at -inf. Raises `GenerationFailed` if the grammar
        turns out to be too much work."""
        if answer_ids and self._free:
            self._look_for_trigger(answer_ids[-1])
        elif answer_ids:
            self._matcher.consume_token(answer_ids[-1])
        if self._free:
            return scores_V
        mask = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise GenerationFailed(f"The answer's grammar could not be followed: {_reason(self._matcher)}")
        return _masked(scores_V, mask)

    def _look_for_trigger(self, token_id: int) -> None:
        written = self._tail + self._vocabulary.decode_bytes([token_id])
        _, found, beyond = written.partition(self._trigger)
        self._tail = written[-len(self._trigger) + 1 :] if len(self._trigger) > 1 else b""
        if found:
            # The token may have gone on behind the trigger. If not as the grammar wants, it was no trigger.
            tokens = self._vocabulary.tokenize_bytes(beyond)
            self._free = self._matcher.validate_tokens(tokens) < len(tokens)
            if not self._free:
                self._matcher.consume_tokens(tokens)


def _reason(matcher: LLMatcher) -> str:
    """Why it cannot go on, in one line: the first, or that of the pattern's parser. The others repeat the grammar."""
    lines = matcher.get_error().strip().splitlines()
    line = next((line for line in lines if line.startswith("error: ")), lines[0])
    line = line.removeprefix("error: ").rpartition("failed to compile JSON schema: ")[2]
    return "nothing follows it" if line.startswith("NoExtension") else line


def _masked(scores_V: Tensor, mask: bytes) -> Tensor:
    """`mask` has one bit a token id, lowest first; ids beyond it are padding of the model's vocabulary."""
    bits = np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little")[: len(scores_V)]
    allowed_V = torch.zeros(len(scores_V), dtype=torch.bool)
    allowed_V[: len(bits)] = torch.from_numpy(bits.astype(bool))
    return scores_V.masked_fill(~allowed_V, -torch.inf)
