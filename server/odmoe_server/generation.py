"""One generation as text: engine tokens in, pieces of text and one ending out. Knows nothing of HTTP or OpenAI."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from odmoe_server.assembly import Assembler, Piece
from odmoe_server.engine_api import (
    Engine,
    ExpertStats,
    Finished,
    FinishReason,
    GenerationFailed,
    GenerationRequest,
    ReadPrompt,
    Substituted,
)
from odmoe_server.metrics import Meter, Times
from odmoe_server.stops import StopFilter
from odmoe_server.text import TextCodec
from odmoe_server.told import Told

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Ending", "Job", "Piece", "generate_text"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to generate, and how its text is shown. `token_ids`: tell those of all tokens. `every_token`: log
    probabilities are also of tokens that have no text, such as the one that ends the answer."""

    request: GenerationRequest
    stops: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    token_ids: bool = False
    every_token: bool = False


@dataclass(frozen=True, kw_only=True)
class Ending:
    """The answer is complete. What only the engine knows (`expert_stats`, `queue_s`) is None if a stop string ended
    it: the engine was not asked for more then. `stopped_by` is that string. Where asked for, `ids` are those of tokens
    that came behind the last piece, and `experts` the pieces of one array (see `Told`)."""

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    times: Times
    cached_tokens: int = 0
    expert_stats: ExpertStats | None = None
    queue_s: float | None = None
    stopped_by: str | None = None
    substituted: Substituted = field(default_factory=Substituted)
    ids: tuple[int, ...] = ()
    experts: "tuple[Tensor, ...]" = ()


async def generate_text(
    engine: Engine, job: Job, *, text: TextCodec, meter: Meter
) -> AsyncGenerator[Piece | Ending, None]:
    """Text as it becomes certain, then `Ending`. Closing this closes the engine's generator.

    Streamed and whole answers both come from here, so they cannot differ. Raises what `Engine.generate` raises.
    """
    assembler, substituted, told = _assembler(job, text), Substituted(), Told(ids=job.token_ids)
    with meter:
        async with aclosing(engine.generate(job.request)) as events:
            async for event in events:
                if isinstance(event, Finished):
                    if rest := assembler.flush(event.end):
                        yield replace(rest, ids=told.take_ids())
                    if event.end is not None:
                        told.token(event.end)
                    reason: FinishReason = "stop" if assembler.stopped_by is not None else event.reason
                    meter.finished(reason)
                    meter.told(event)
                    meter.sized(prompt_tokens=event.prompt_tokens, generation_tokens=event.completion_tokens)
                    yield _ending(event, reason, meter=meter, stopped_by=assembler.stopped_by, told=told)
                    return
                if isinstance(event, ReadPrompt):
                    told.computed(event)
                    if event.tokens:
                        yield Piece("", prompt=event.tokens)
                    continue
                meter.token()
                told.token(event)
                substituted = event.substituted or substituted
                if (piece := assembler.push(event)) is not None:
                    yield replace(piece, ids=told.take_ids()) if job.token_ids else piece
                if assembler.stopped_by is not None:
                    meter.finished("stop")
                    meter.sized(prompt_tokens=len(job.request.prompt_ids), generation_tokens=assembler.num_tokens)
                    break
        if assembler.stopped_by is None:
            raise GenerationFailed("The generation ended without saying why.")
    yield Ending(
        reason="stop",
        prompt_tokens=len(job.request.prompt_ids),
        completion_tokens=assembler.num_tokens,
        times=meter.times(),
        stopped_by=assembler.stopped_by,
        substituted=substituted,
        ids=told.take_ids(),
        experts=tuple(told.experts),
    )


def _assembler(job: Job, text: TextCodec) -> Assembler:
    sampling = job.request.sampling
    return Assembler(
        text.detokeniser(skip_special_tokens=job.skip_special_tokens),
        StopFilter(job.stops, include=job.include_stop),
        min_tokens=sampling.min_tokens,
        with_tokens=sampling.top_logprobs is not None,
        with_hidden=job.every_token,
    )


def _ending(event: Finished, reason: FinishReason, *, meter: Meter, stopped_by: str | None, told: Told) -> Ending:
    return Ending(
        reason=reason,
        prompt_tokens=event.prompt_tokens,
        completion_tokens=event.completion_tokens,
        times=meter.times(),
        cached_tokens=event.cached_tokens,
        expert_stats=event.expert_stats,
        queue_s=event.queue_s,
        stopped_by=stopped_by,
        substituted=Substituted(event.expert_stats.substituted, event.expert_stats.activations),
        ids=told.take_ids(),
        experts=tuple(told.experts),
    )
