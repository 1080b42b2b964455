"""Bodies of answers, as pydantic models: what the OpenAPI document says, and what whole answers are written with.

Written with `exclude_unset`, so that a field shows only where it was given.
"""

from typing import Literal

from pydantic import BaseModel

FinishReason = Literal["stop", "length", "tool_calls"]


class PromptTokensDetails(BaseModel):
    """Prompt tokens that were not computed anew."""

    cached_tokens: int


class CompletionTokensDetails(BaseModel):
    """Tokens of the answer that are not shown."""

    reasoning_tokens: int


class ExpertSubstitutions(BaseModel):
    """How many of the experts the gates chose others stood in for, and which share of them that is. Only where there
    were any."""

    count: int
    share: float


class Usage(BaseModel):
    """Token counts of one answer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails
    expert_substitutions: ExpertSubstitutions | None = None


class RequestMetrics(BaseModel):
    """How long the answer took; with `return_metrics`. What only the engine knows is null if a stop string ended it."""

    time_to_first_token_ms: float
    generation_time_ms: float
    queue_time_ms: float | None
    mean_itl_ms: float | None
    tokens_per_second: float | None


class ExpertCounts(BaseModel):
    """What the experts of the answer's decode steps cost, over layers and steps; with `return_expert_stats`.
    `bytes_loaded` for these, not by wrong forecasts; what several answers shared counts for each."""

    activations: int
    predicted: int
    hit: int
    late: int
    missed: int
    substituted: int
    drafted: int
    accepted: int
    bytes_loaded: int
    wait_ms: float
    stall_ms: float


class Reports(BaseModel):
    """What an answer carries only where it was asked for."""

    metrics: RequestMetrics | None = None
    expert_stats: ExpertCounts | None = None


class TopLogprob(BaseModel):
    """One of the likeliest tokens at a place."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """The token that was chosen there."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(BaseModel):
    """Of the tokens that make up the content."""

    content: list[TokenLogprob]
    refusal: None


class CalledFunction(BaseModel):
    """What the model calls, and with what: JSON in a string, in a chunk the next piece of it."""

    name: str | None = None
    arguments: str


class MessageToolCall(BaseModel):
    """A call of a function."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class DeltaToolCall(BaseModel):
    """What a chunk adds to a call; id, type and name come with its first."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction


class AssistantMessage(BaseModel):
    """The answer. Without text, where it is nothing but calls."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[MessageToolCall] | None = None


class PromptLogprob(BaseModel):
    """One token that could stand, or stands, at a place of the prompt; `rank` is its place among all, from 1."""

    logprob: float
    rank: int
    decoded_token: str


class OfPrompt(BaseModel):
    """What is told of a prompt where it was asked for: `return_token_ids`, `prompt_logprobs`. The latter are by token
    ids, and null for the first token."""

    prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None


class OfTokens(BaseModel):
    """What is told of an answer's tokens where it was asked for: `return_token_ids` (the one that ended it included)
    and `return_routed_experts`: base64 of a .npy file, an array [tokens, MoE layers, experts a token] of whole numbers,
    for the prompt's tokens and the answer's but the last, which never goes through the model."""

    token_ids: list[int] | None = None
    routed_experts: str | None = None


class Choice(OfTokens):
    """One answer, whole. `stop_reason` is the stop string that ended it, if one did."""

    index: int
    message: AssistantMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | None = None


class ChatCompletion(Reports, OfPrompt):
    """Body of an answer that is not streamed."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage


class Delta(BaseModel):
    """What a chunk adds to the answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[DeltaToolCall] | None = None


class ChunkChoice(OfTokens):
    """One answer's share of a chunk."""

    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | None = None


class ChatChunk(Reports):
    """One event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    prompt_token_ids: list[int] | None = None
    usage: Usage | None = None
    expert_substitutions: ExpertSubstitutions | None = None


class CompletionLogprobs(BaseModel):
    """Of the tokens that make up the text; `text_offset` is where each begins. Null for a prompt's first, which
    follows none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(OfTokens, OfPrompt):
    """One text completion, whole or the next piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | None = None


class TextCompletion(Reports):
    """Body of a text completion, and one event of a stream of it."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    expert_substitutions: ExpertSubstitutions | None = None


class Tokens(BaseModel):
    """Body of POST /tokenize."""

    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] | None = None


class Detokenized(BaseModel):
    """Body of POST /detokenize; `prompt` is vLLM's name, `content` llama.cpp's."""

    prompt: str
    content: str


class Model(BaseModel):
    """One name a model is served under; `root` is the name it goes back to."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int


class ModelList(BaseModel):
    """Body of GET /v1/models."""

    object: Literal["list"]
    data: list[Model]


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Body of every answer that is not a success."""

    error: ErrorDetail
