"""Bodies of requests and answers, as pydantic models. Knows shapes and ranges; not models, engines or sockets.

Requests are strict: types are not converted, unknown fields are refused. Answers are written with
`exclude_unset`, so that a field shows only where it was given.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from odmoe_server.openai.errors import (
    InvalidRequest,
    MalformedBody,
    RequestError,
    UnknownParameter,
    UnsupportedParameter,
)
from odmoe_server.openai.fields import CHAT_FIELDS, MESSAGE_FIELDS, STREAM_OPTION_FIELDS, without_neutral

MAX_STOPS = 16
MAX_STOP_CHARS = 1000
_INT64 = 2**63


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


# ------------------------------------------------------------------------------------------------------- requests


class TextPart(_Body):
    """A piece of a message."""

    type: Literal["text"]
    text: str


def _kind_of_content(content: Any) -> str:
    return "(parts)" if isinstance(content, list) else "(text)"


# The tags show up in pydantic's error locations; the brackets let `_param` tell them from field names.
Content = Annotated[
    Annotated[str, Tag("(text)")] | Annotated[tuple[TextPart, ...], Field(min_length=1, strict=False), Tag("(parts)")],
    Discriminator(_kind_of_content),
]


class ChatMessage(_Body):
    """One message of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = None

    def text(self) -> str:
        """The content as one string; parts are lines of their own."""
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)


class StreamOptions(_Body):
    """What a stream carries besides the text."""

    include_usage: bool | None = None


Stop = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARS)]


class ChatRequest(_Body):
    """Body of POST /v1/chat/completions."""

    model: str
    messages: Annotated[tuple[ChatMessage, ...], Field(min_length=1, strict=False)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-_INT64, lt=_INT64)
    stop: Annotated[tuple[Stop, ...], Field(max_length=MAX_STOPS, strict=False)] | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    ignore_eos: bool | None = None
    # Accepted because they do not touch the answer.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    prediction: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop_is_a_list(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @property
    def token_limit(self) -> int | None:
        """The most tokens the client wants; the newer field wins."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @model_validator(mode="before")
    @classmethod
    def _refuse_by_name(cls, body: Any) -> Any:
        body = without_neutral(body, not_yet=CHAT_FIELDS)
        if not isinstance(body, dict):
            return body
        options = without_neutral(body.get("stream_options"), not_yet=STREAM_OPTION_FIELDS, where="stream_options.")
        messages = body.get("messages")
        if isinstance(messages, list):
            body["messages"] = [_checked_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
        return {**body, "stream_options": options}

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> "ChatRequest":
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("'stream_options' is only allowed when 'stream' is true.", param="stream_options")
        return self


def _checked_message(message: Any, where: str) -> Any:
    message = without_neutral(message, not_yet=MESSAGE_FIELDS, where=f"{where}.")
    if not isinstance(message, dict):
        return message
    if message.get("role") in ("tool", "function"):
        raise UnsupportedParameter(
            f"Messages of role '{message['role']}' are not supported by this server.", param=f"{where}.role"
        )
    content = message.get("content")
    for i, part in enumerate(content if isinstance(content, list) else []):
        kind = part.get("type") if isinstance(part, dict) else "text"
        if isinstance(kind, str) and kind != "text":
            raise UnsupportedParameter(
                f"Content parts of type '{kind}' are not supported by this server, only 'text'.",
                param=f"{where}.content[{i}].type",
            )
    return message


def parse_chat(body: bytes) -> ChatRequest:
    """Reads a request body; everything wrong with it is a `RequestError` which names the field."""
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise _first_problem(error) from None


def _first_problem(error: ValidationError) -> RequestError:
    problem = error.errors(include_url=False, include_input=False)[0]
    param = _param(problem["loc"])
    if problem["type"] == "json_invalid":
        return MalformedBody(f"The request body is not valid JSON: {problem['ctx']['error']}.")
    if not problem["loc"]:
        return MalformedBody("The request body must be a JSON object.")
    if problem["type"] == "extra_forbidden":
        return UnknownParameter(
            f"Unrecognized request argument supplied: '{param}'. This server refuses fields it does not know, also"
            " those which an SDK sends as extra_body, rather than ignore them.",
            param=param,
        )
    return InvalidRequest(f"Invalid value for '{param}': {problem['msg']}.", param=param)


def _param(location: tuple[int | str, ...]) -> str:
    """Pydantic's location as OpenAI writes it: messages[0].content[1].text"""
    param = ""
    for step in location:
        if isinstance(step, int):
            param += f"[{step}]"
        elif not step.startswith("("):
            param += f".{step}" if param else step
    return param


# -------------------------------------------------------------------------------------------------------- answers

FinishReason = Literal["stop", "length"]


class PromptTokensDetails(BaseModel):
    """Prompt tokens that were not computed anew."""

    cached_tokens: int


class CompletionTokensDetails(BaseModel):
    """Tokens of the answer that are not shown."""

    reasoning_tokens: int


class Usage(BaseModel):
    """Token counts of one answer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class AssistantMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"]
    content: str
    refusal: None


class Choice(BaseModel):
    """One answer, whole."""

    index: int
    message: AssistantMessage
    logprobs: None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
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


class ChunkChoice(BaseModel):
    """One answer's share of a chunk."""

    index: int
    delta: Delta
    logprobs: None
    finish_reason: FinishReason | None


class ChatChunk(BaseModel):
    """One event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


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
