"""POST /v1/completions: from prompts, as texts or tokens, to generations. Each prompt has n choices, one after another.

Knows the text codec and the order of checks. Does not know how an answer is written.
"""

from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response

from odmoe_server.answering import Answerer
from odmoe_server.catalog import Catalog
from odmoe_server.engine_api import GenerationRequest
from odmoe_server.openai.chat import job, letterhead, tenant
from odmoe_server.openai.completion_dialect import CompletionDialect
from odmoe_server.openai.errors import InvalidRequest
from odmoe_server.openai.generating import seeded
from odmoe_server.openai.render import Extras
from odmoe_server.openai.schemas import CompletionRequest, Prompt


@dataclass(frozen=True, kw_only=True)
class CompletionService:
    """Answers requests for text completions."""

    answerer: Answerer
    catalog: Catalog

    async def answer(self, asked: CompletionRequest, *, request: Request) -> Response:
        """The response, or an exception from the error table. `request` tells whether the client is still there."""
        self.catalog.check(asked.model)
        asked.check(self.answerer.limits)
        num_each = asked.n or 1
        self.answerer.check_ready(num_answers=num_each * len(asked.prompts))
        sampling = asked.sampling(self.catalog.sampling, vocab_size=self.answerer.text.vocab_size)
        prompts = [await self._ids(prompt, asked) for prompt in asked.prompts]
        head = letterhead("cmpl", asked.model, catalog=self.catalog, request=request)
        jobs = [
            job(
                asked,
                GenerationRequest(
                    request_id=f"{head.id}-{number}-{choice}",
                    prompt_ids=ids,
                    max_tokens=self.answerer.room(ids, wanted=asked.token_limit, param="prompt"),
                    sampling=seeded(sampling, number=choice),
                    tenant=tenant(request),
                    alpha=asked.expert_substitution,
                ),
            )
            for number, ids in enumerate(prompts)
            for choice in range(num_each)
        ]
        dialect = CompletionDialect(
            head,
            extras=Extras.asked(asked, prompt_tokens=sum(map(len, prompts))),
            text=self.answerer.text,
            with_logprobs=asked.num_top_logprobs is not None,
            echoes=[echo for prompt in asked.prompts for echo in [await self._echo(prompt, asked)] * num_each],
        )
        return await self.answerer.answer(jobs, dialect=dialect, stream=bool(asked.stream), request=request)

    async def _ids(self, prompt: Prompt, asked: CompletionRequest) -> tuple[int, ...]:
        if isinstance(prompt, str):
            ids = await self.answerer.text.encode(prompt, add_special_tokens=asked.add_special_tokens is not False)
            if not ids:
                raise InvalidRequest("An empty prompt has no tokens for this model to go on from.", param="prompt")
            return ids
        wrong = [token_id for token_id in prompt if token_id >= self.answerer.text.vocab_size]
        if wrong:
            raise InvalidRequest(f"This model has no token {wrong[0]}.", param="prompt")
        return prompt

    async def _echo(self, prompt: Prompt, asked: CompletionRequest) -> str:
        if not asked.echo:
            return ""
        return prompt if isinstance(prompt, str) else await self.answerer.text.decode(prompt)
