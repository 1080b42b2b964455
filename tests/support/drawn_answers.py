"""Answers drawn by chance under a constraint, and an engine that says them: what the worst of models would write."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

import torch

from odmoe_server.engine.sampling import Sampler
from odmoe_server.engine_api import Constraint, ExpertStats, Finished, GenerationRequest, Sampling, Token
from support.scripted_engine import ScriptedEngine, tiny_tokenizer

END = tiny_tokenizer().eos_token_id


def drawn(constraint: Constraint, *, seed: int, told: Sequence[int] = (), most: int = 4000) -> list[int]:
    """Tokens as a model that knows nothing draws them, after those of `told`; ends with the end token."""
    allow = constraint.start()
    scores = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    while len(ids) < most:
        scores_V = allow(list(ids), torch.randn(len(tiny_tokenizer()) + 3, generator=scores))
        ids.append(told[len(ids)] if len(ids) < len(told) else int(scores_V.argmax()))
        if ids[-1] == END:
            break
    return ids


@dataclass
class DrawingEngine(ScriptedEngine):
    """Draws every answer by chance, through the engine's own sampler, after the script's tokens."""

    seed: int = 0

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Token | Finished, None]:
        """See Engine."""
        self.requests.append(request)
        scores = torch.Generator().manual_seed(self.seed)
        sampler = Sampler(Sampling(temperature=0, constraint=request.sampling.constraint))
        ids = list(request.prompt_ids)
        told = list(self.script)
        for _ in range(request.max_tokens):
            token = sampler.next_token(torch.randn(len(tiny_tokenizer()), generator=scores), ids)
            if told:
                step = told.pop(0)
                assert isinstance(step, int)
                token = Token(step)
            ids.append(token.token_id)
            if token.token_id == END:
                break
            yield token
        yield Finished(
            reason="stop" if ids[-1] == END else "length",
            prompt_tokens=len(request.prompt_ids),
            completion_tokens=len(ids) - len(request.prompt_ids),
            expert_stats=ExpertStats(),
        )
