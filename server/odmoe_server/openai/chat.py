"""POST /v1/chat/completions: from a checked request to generations. The other conversations' APIs use it, too.

Knows the text codec and the order of checks (cheap ones first, nothing is tokenised for a server that cannot answer).
Does not know sampling, queues or nodes, nor how an answer is written.
"""

import time
import uuid
from dataclasses import dataclass, replace

from starlette.requests import Request
from starlette.responses import Response

from odmoe_server.answering import Answerer
from odmoe_server.catalog import Catalog
from odmoe_server.engine_api import GenerationRequest
from odmoe_server.generation import Job
from odmoe_server.openai.chat_dialect import ChatDialect
from odmoe_server.openai.generating import Generating, seeded
from odmoe_server.openai.reading import Reading, check_size
from odmoe_server.openai.render import Extras, Letterhead
from odmoe_server.openai.schemas import ChatRequest
from odmoe_server.openai.token_choice import token_bound
from odmoe_server.openai.tools_format import ToolFormat
from odmoe_server.openai.tools_kit import ToolKit
from odmoe_server.openai.tools_messages import for_template


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A chat request that can be answered: what to generate, and how calls are written in it, if there may be any."""

    jobs: tuple[Job, ...]
    form: ToolFormat | None

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """Of the conversation."""
        return self.jobs[0].request.prompt_ids

    @property
    def num_prompt_tokens(self) -> int:
        """Of the conversation."""
        return len(self.prompt_ids)


@dataclass(frozen=True, kw_only=True)
class ChatService:
    """Answers chat requests."""

    answerer: Answerer
    catalog: Catalog
    kit: ToolKit

    async def answer(self, chat: ChatRequest, *, request: Request) -> Response:
        """The response, or an exception from the error table. `request` tells whether the client is still there."""
        head = letterhead("chatcmpl", chat.model, catalog=self.catalog, request=request)
        prepared = await self.prepare(chat, answer_id=head.id, tenant=tenant(request))
        dialect = ChatDialect(
            head,
            extras=Extras.asked(chat, prompt_tokens=prepared.num_prompt_tokens),
            text=self.answerer.text,
            with_logprobs=chat.num_top_logprobs is not None,
            form=prepared.form,
            reading=Reading.asked(chat, text=self.answerer.text, prompts=[prepared.prompt_ids] * len(prepared.jobs)),
        )
        return await self.answerer.answer(prepared.jobs, dialect=dialect, stream=bool(chat.stream), request=request)

    async def prepare(self, chat: ChatRequest, *, answer_id: str, tenant: str) -> Prepared:
        """Everything up to the generations. Raises what the error table has."""
        self.catalog.check(chat.model)
        chat.check(self.answerer.limits)
        self.answerer.check_ready(num_answers=chat.n or 1)
        options = chat.tool_options
        sampling = replace(
            chat.sampling(self.catalog.sampling, vocab_size=self.answerer.text.vocab_size),
            constraint=await self.kit.constraint(options, form=chat.form)
            or await token_bound(chat, text=self.answerer.text),
        )
        prompt_ids = await self.prompt_ids(chat)
        max_tokens = self.answerer.room(prompt_ids, wanted=chat.token_limit, param="messages")
        jobs = [
            job(
                chat,
                GenerationRequest(
                    request_id=f"{answer_id}-{number}",
                    prompt_ids=prompt_ids,
                    max_tokens=max_tokens,
                    sampling=seeded(sampling, number=number),
                    tenant=chat.within(tenant),
                    alpha=chat.expert_substitution,
                    prompt_logprobs=chat.num_prompt_logprobs,
                    routed_experts=bool(chat.return_routed_experts),
                ),
            )
            for number in range(chat.n or 1)
        ]
        check_size(chat, [prompt_ids] * len(jobs), max_tokens=[max_tokens] * len(jobs))
        return Prepared(jobs=tuple(jobs), form=await self.kit.form() if options.callable else None)

    async def prompt_ids(self, chat: ChatRequest) -> tuple[int, ...]:
        """Token ids of the conversation, its tools told in it. Raises InvalidRequest."""
        messages, offered = for_template(chat.messages), chat.tool_options.offered
        rendering = chat.rendering(messages)
        return chat.truncated(await self.kit.prompt_ids(messages, offered=offered, rendering=rendering))


def letterhead(prefix: str, model: str, *, catalog: Catalog, request: Request) -> Letterhead:
    """For a new answer, whose id is not the client's request id, which may come twice."""
    answer_id = request.state.answer_id = f"{prefix}-{uuid.uuid4().hex}"
    return Letterhead(id=answer_id, created=int(time.time()), model=model, system_fingerprint=catalog.fingerprint)


def tenant(request: Request) -> str:
    """Whose request it is; of a server without keys, everyone's."""
    return str(getattr(request.state, "tenant", ""))


def job(asked: Generating, generation: GenerationRequest) -> Job:
    """One generation, its text shown as the request wants it."""
    return Job(
        request=generation,
        stops=asked.stop or (),
        include_stop=bool(asked.include_stop_str_in_output),
        skip_special_tokens=asked.skip_special_tokens is not False,
        token_ids=bool(asked.return_token_ids),
    )
