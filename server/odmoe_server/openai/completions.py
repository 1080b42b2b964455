"""POST /v1/completions: from prompts, as texts or tokens, to generations. Each prompt has n choices, one after another.

Knows the text codec and the order of checks. Does not know how an answer is written.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from anyio import to_thread
from starlette.requests import Request
from starlette.responses import Response

from odmoe_server.answering import Answerer
from odmoe_server.catalog import Catalog
from odmoe_server.engine_api import GenerationRequest
from odmoe_server.openai.chat import job, letterhead, tenant
from odmoe_server.openai.completion_dialect import CompletionDialect, Echo
from odmoe_server.openai.errors import InvalidRequest
from odmoe_server.openai.generating import seeded
from odmoe_server.openai.reading import Reading, check_size, offsets
from odmoe_server.openai.render import Extras, Letterhead
from odmoe_server.openai.schemas import CompletionRequest, Prompt
from odmoe_server.openai.token_choice import token_bound
from odmoe_server.openai.tools import ToolOptions
from odmoe_server.openai.tools_kit import ToolKit


@dataclass(frozen=True, kw_only=True)
class CompletionService:
    """Answers requests for text completions."""

    answerer: Answerer
    catalog: Catalog
    kit: ToolKit

    async def answer(self, asked: CompletionRequest, *, request: Request) -> Response:
        """The response, or an exception from the error table. `request` tells whether the client is still there."""
        self.catalog.check(asked.model)
        asked.check(self.answerer.limits)
        num_each = asked.n or 1
        self.answerer.check_ready(num_answers=num_each * len(asked.prompts))
        sampling = replace(
            asked.sampling(self.catalog.sampling, vocab_size=self.answerer.text.vocab_size),
            constraint=await self.kit.constraint(ToolOptions(), form=asked.form)
            or await token_bound(asked, text=self.answerer.text),
        )
        prompts = [asked.truncated(await self._ids(prompt, asked)) for prompt in asked.prompts]
        head = letterhead("cmpl", asked.model, catalog=self.catalog, request=request)
        jobs = [
            replace(
                job(
                    asked,
                    GenerationRequest(
                        request_id=f"{head.id}-{number}-{choice}",
                        prompt_ids=ids,
                        max_tokens=self.answerer.room(ids, wanted=asked.token_limit, param="prompt"),
                        sampling=seeded(sampling, number=choice),
                        tenant=asked.within(tenant(request)),
                        alpha=asked.expert_substitution,
                        prompt_logprobs=asked.num_prompt_logprobs,
                        routed_experts=bool(asked.return_routed_experts),
                    ),
                ),
                every_token=asked.echoes_logprobs,
            )
            for number, ids in enumerate(prompts)
            for choice in range(num_each)
        ]
        each = [each.request for each in jobs]
        check_size(asked, [one.prompt_ids for one in each], max_tokens=[one.max_tokens for one in each])
        dialect = await self._dialect(asked, head, prompts=prompts)
        return await self.answerer.answer(jobs, dialect=dialect, stream=bool(asked.stream), request=request)

    async def _dialect(
        self, asked: CompletionRequest, head: Letterhead, *, prompts: Sequence[tuple[int, ...]]
    ) -> CompletionDialect:
        num_each, text = asked.n or 1, self.answerer.text
        of_each = list(zip(asked.prompts, prompts, strict=True))
        return CompletionDialect(
            head,
            extras=Extras.asked(asked, prompt_tokens=sum(map(len, prompts))),
            text=text,
            num_logprobs=asked.num_top_logprobs,
            echoes=[echo for prompt, ids in of_each for echo in [await self._echo(prompt, ids, asked)] * num_each],
            reading=Reading.asked(asked, text=text, prompts=[ids for ids in prompts for _ in range(num_each)]),
            hides=text.detokeniser(skip_special_tokens=asked.skip_special_tokens is not False).hides,
        )

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

    async def _echo(self, prompt: Prompt, ids: tuple[int, ...], asked: CompletionRequest) -> Echo:
        if not asked.echo:
            return Echo()
        text = prompt if isinstance(prompt, str) else await self.answerer.text.decode(prompt)
        if not asked.echoes_logprobs:
            return Echo(text=text)
        found = await to_thread.run_sync(partial(offsets, ids, shown=text, text=self.answerer.text))
        return Echo(text=text, offsets=found)
