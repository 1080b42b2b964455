"""An engine that says what a test has written for it, and a byte-level tokenizer for its words.

Real objects behind the real interface: nothing is patched. Time does not pass by itself; a script waits at a gate.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from odmoe_server.engine_api import (
    EngineHealth,
    ExpertStats,
    Finished,
    FinishReason,
    GenerationRequest,
    NodeHealth,
    Token,
)

CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'system' and not loop.first %}"
    "{{ raise_exception('System message must come first') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
READY = EngineHealth(
    state="ready",
    detail="ready",
    running=1,
    queued=2,
    predictor_alive=True,
    nodes=(
        NodeHealth(
            peer_id="node-0",
            role="node",
            alive=True,
            slots=4,
            used_slots=1,
            accounted_bytes=1000,
            budget_bytes=4000,
            rss_bytes=5000,
            loads_total=7,
            loads_unused_total=2,
            load_bytes_total=7000,
            load_s_total=0.5,
            compute_s_total=0.25,
        ),
    ),
    totals=ExpertStats(activations=10, predicted=9, hit=7, late=2, missed=1, wait_s=0.125),
    failovers_total=3,
    prompt_tokens_total=11,
    generation_tokens_total=22,
    protocol_errors_total=4,
    failures_total=5,
)


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, so that characters fall apart; chat markers are special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", bos_token="<|im_start|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def words(text: str) -> list[int]:
    """The tokens of a text, one a byte."""
    ids: list[int] = tiny_tokenizer().encode(text, add_special_tokens=False)
    return ids


class Gate:
    """A place in a script where it stays until a test opens it."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.opened = asyncio.Event()


Step = int | Gate | Exception


@dataclass
class ScriptedEngine:
    """Says `script` to every request. Each step is a token, an exception, or a gate."""

    script: Sequence[Step] = ()
    reason: FinishReason = "stop"
    context_length: int = 512
    state: EngineHealth = READY
    requests: list[GenerationRequest] = field(default_factory=list)
    open_generators: int = 0
    tokens_said: int = 0

    @classmethod
    def saying(cls, text: str, **options: object) -> "ScriptedEngine":
        """One that says a text."""
        return cls(script=words(text), **options)  # type: ignore[arg-type]

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Token | Finished, None]:
        """See Engine."""
        self.requests.append(request)
        self.open_generators += 1
        num_tokens = 0
        try:
            for step in self.script:
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, Gate):
                    step.reached.set()
                    await step.opened.wait()
                    continue
                num_tokens += 1
                self.tokens_said += 1
                yield Token(step)
                if num_tokens == request.max_tokens:
                    yield self._finished(request, num_tokens, reason="length")
                    return
            yield self._finished(request, num_tokens + (self.reason == "stop"), reason=self.reason)
        finally:
            self.open_generators -= 1

    def health(self) -> EngineHealth:
        """See Engine."""
        return self.state

    def unready(self, state: str, detail: str) -> None:
        """Put the engine into another state."""
        self.state = replace(self.state, state=state, detail=detail)  # type: ignore[arg-type]

    def _finished(self, request: GenerationRequest, num_tokens: int, *, reason: FinishReason) -> Finished:
        return Finished(
            reason=reason,
            prompt_tokens=len(request.prompt_ids),
            completion_tokens=num_tokens,
            expert_stats=ExpertStats(activations=num_tokens),
        )
