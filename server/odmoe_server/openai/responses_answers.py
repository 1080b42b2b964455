"""Bodies of answers under /v1/responses, as pydantic models: what the OpenAPI document says of them."""

from typing import Any, Literal

from pydantic import BaseModel

from odmoe_server.openai.answers import ExpertSubstitutions


class OutputText(BaseModel):
    """Text of a message."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[Any]


class OutputMessage(BaseModel):
    """A message of the answer."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[OutputText]


class OutputCall(BaseModel):
    """A call of a function; `arguments` is JSON in a string."""

    id: str
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    status: Literal["in_progress", "completed", "incomplete"]


class InputDetails(BaseModel):
    """Tokens of the prompt that were there already."""

    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(BaseModel):
    """Tokens of the answer that are not shown."""

    reasoning_tokens: int


class ResponseUsage(BaseModel):
    """Token counts."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int
    expert_substitutions: ExpertSubstitutions | None = None


class Failure(BaseModel):
    """Why there is no whole answer."""

    code: str
    message: str


class Incomplete(BaseModel):
    """Why the answer was cut off."""

    reason: Literal["max_output_tokens"]


class ResponseResource(BaseModel):
    """A response: what was asked, and what has come of it."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: float | None
    status: Literal["in_progress", "completed", "incomplete", "failed", "cancelled"]
    background: bool
    error: Failure | None
    incomplete_details: Incomplete | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    model: str
    output: list[OutputMessage | OutputCall]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: dict[str, Any]
    safety_identifier: str | None
    service_tier: str
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    user: str | None
    metadata: dict[str, str]


class ResponseEvent(BaseModel):
    """One event of a stream; what else is in it goes by its type, as OpenAI documents it."""

    type: str
    sequence_number: int


class DeletedResponse(BaseModel):
    """Body of DELETE /v1/responses/{response_id}."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]
