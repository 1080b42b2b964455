"""One generation as text: engine tokens in, pieces of text and one ending out. Knows nothing of HTTP or OpenAI."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from odmoe_server.engine_api import Engine, ExpertStats, Finished, FinishReason, GenerationFailed, GenerationRequest
from odmoe_server.metrics import Meter
from odmoe_server.stops import StopFilter
from odmoe_server.text import Detokeniser


@dataclass(frozen=True)
class Piece:
    """More of the answer's text; never empty, except the first one of an answer."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Ending:
    """The answer is complete. `expert_stats` is None if a stop string ended it."""

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    expert_stats: ExpertStats | None


async def generate_text(
    engine: Engine, request: GenerationRequest, *, detokeniser: Detokeniser, stops: Sequence[str], meter: Meter
) -> AsyncGenerator[Piece | Ending, None]:
    """Text as it becomes certain, then `Ending`. Closing this closes the engine's generator.

    Streamed and whole answers both come from here, so they cannot differ. Raises what `Engine.generate` raises.
    """
    stop_filter = StopFilter(stops)
    num_tokens = 0
    with meter:
        async with aclosing(engine.generate(request)) as events:
            async for event in events:
                if isinstance(event, Finished):
                    if rest := stop_filter.push(detokeniser.flush()) + stop_filter.flush():
                        yield Piece(rest)
                    reason: FinishReason = "stop" if stop_filter.stopped else event.reason
                    meter.finished(reason)
                    yield _ending(event, reason)
                    return
                num_tokens += 1
                meter.token()
                text = stop_filter.push(detokeniser.push(event.token_id))
                if text or num_tokens == 1:
                    yield Piece(text)
                if stop_filter.stopped:
                    meter.finished("stop")
                    break
        if not stop_filter.stopped:
            raise GenerationFailed("The generation ended without saying why.")
    yield Ending(
        reason="stop",
        prompt_tokens=len(request.prompt_ids),
        completion_tokens=num_tokens,
        expert_stats=None,
    )


def _ending(event: Finished, reason: FinishReason) -> Ending:
    return Ending(
        reason=reason,
        prompt_tokens=event.prompt_tokens,
        completion_tokens=event.completion_tokens,
        expert_stats=event.expert_stats,
    )
