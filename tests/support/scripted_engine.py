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
    ClusterFigures,
    EngineHealth,
    ExpertStats,
    Finished,
    FinishReason,
    GenerationRequest,
    LayerOutcomes,
    NodeHealth,
    Spread,
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
            load_times=Spread(bounds=(0.1, 1.0), counts=(4, 2, 1), sum=0.5),
            rpc_times=Spread(bounds=(0.1, 1.0), counts=(8, 0, 0), sum=0.4),
            loads_failed_total=11,
            loads_cancelled_total=12,
            loads_broken_off_total=13,
            broken_off_s_total=0.75,
            evictions_total=14,
            late_forecasts_total=15,
            stale_total=16,
            duplicates_total=17,
            expired_total=18,
            overflowed_total=19,
            undelivered_total=20,
            loop_errors_total=21,
            protocol_errors_total=22,
            bad_messages_total=23,
        ),
        NodeHealth(
            peer_id="predictor",
            role="predictor",
            alive=True,
            slots=0,
            used_slots=0,
            accounted_bytes=0,
            budget_bytes=0,
            rss_bytes=0,
            loads_total=0,
            loads_unused_total=0,
            load_bytes_total=0,
            load_s_total=0.0,
            compute_s_total=0.0,
            undelivered_total=31,
            loop_errors_total=32,
            protocol_errors_total=33,
            bad_messages_total=34,
            forecasts_total=35,
            rebirths_total=36,
        ),
    ),
    totals=ExpertStats(
        activations=10,
        predicted=8,
        predicted_late=1,
        hit=7,
        late=2,
        missed=1,
        wait_s=0.125,
        stall_s=0.0625,
        drafted=6,
        accepted=4,
        substituted=3,
    ),
    failovers_total=3,
    prompt_tokens_total=11,
    generation_tokens_total=22,
    protocol_errors_total=4,
    failures_total=5,
    kv_reserved_bytes=300,
    kv_prefix_bytes=100,
    kv_budget_bytes=1600,
    cluster=ClusterFigures(
        epoch=41,
        rejoins_total=42,
        stale_total=43,
        duplicates_total=44,
        realigns_total=45,
        loop_errors_total=46,
        lead_layers=47,
        layers=(
            LayerOutcomes(layer=0, hit=5, late=1, missed=0),
            LayerOutcomes(layer=1, hit=2, late=1, missed=1, substituted=3),
        ),
        story=((12.5, "node node-0 joined"),),
    ),
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
                yield _scored(step, request.sampling.top_logprobs)
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
            queue_s=0.25,
            prefill_s=0.5,
            decode_s=2.0,
            cached_tokens=3,
        )


def _scored(token_id: int, num_top: int | None) -> Token:
    """With log probabilities if asked: its own is -1, the likeliest are the tokens 0, 1, 2 ..."""
    if num_top is None:
        return Token(token_id)
    return Token(token_id, logprob=-1.0, top=tuple((other, -0.5 - other) for other in range(num_top)))
