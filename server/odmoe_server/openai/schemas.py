"""Bodies of requests, as pydantic models. Knows shapes and ranges; not models, engines or sockets."""

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from odmoe_server.limits import ServiceLimits
from odmoe_server.openai.body import Body
from odmoe_server.openai.errors import InvalidRequest, UnsupportedParameter
from odmoe_server.openai.fields import CHAT_FIELDS, COMPLETION_FIELDS, MESSAGE_FIELDS, without_neutral
from odmoe_server.openai.generating import MAX_TOP_LOGPROBS, Generating, check_choices
from odmoe_server.openai.templated import Templated
from odmoe_server.openai.tools import MAX_TOOLS, Tool, ToolCall, ToolChoice, ToolOptions

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, for text completions


class TextPart(Body):
    """A piece of a message."""

    type: Literal["text"]
    text: str


def _kind_of_content(content: Any) -> str:
    return "(parts)" if isinstance(content, list) else "(text)"


# The tags show up in pydantic's error locations; the brackets let `body._param` tell them from field names.
Content = Annotated[
    Annotated[str, Tag("(text)")] | Annotated[tuple[TextPart, ...], Field(min_length=1, strict=False), Tag("(parts)")],
    Discriminator(_kind_of_content),
]


class ChatMessage(Body):
    """One message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None
    tool_calls: Annotated[tuple[ToolCall, ...], Field(strict=False)] | None = None
    tool_call_id: str | None = None

    def text(self) -> str:
        """The content as one string; parts are lines of their own."""
        if self.content is None:
            return ""
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)


Messages = Annotated[tuple[ChatMessage, ...], Field(min_length=1, strict=False)]


def _check_number(messages: tuple[ChatMessage, ...], limits: ServiceLimits) -> None:
    if len(messages) > limits.max_messages:
        raise InvalidRequest(f"This server takes at most {limits.max_messages} messages.", param="messages")


class ChatRequest(Templated, Generating):
    """Body of POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: Annotated[tuple[Tool, ...], Field(max_length=MAX_TOOLS, strict=False)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    # Accepted because they do not touch the answer.
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    prediction: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    @property
    def token_limit(self) -> int | None:
        """The most tokens the client wants; the newer field wins."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_top_logprobs(self) -> int | None:
        """See `Generating`."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def check(self, limits: ServiceLimits) -> None:
        """See `Generating`."""
        super().check(limits)
        _check_number(self.messages, limits)
        check_choices(self.n, limits=limits)
        self._check_form()

    @property
    def tool_options(self) -> ToolOptions:
        """The tools and which of them may or must be called. Raises InvalidRequest if they do not fit together."""
        choice = self.tool_choice or "auto"
        return ToolOptions(
            tools=self.tools or (), choice=choice, parallel=self.parallel_tool_calls is not False
        ).check()

    def _check_form(self) -> None:
        """What does not go with an answer of a given form. Raises InvalidRequest."""
        offered = self.tool_options.offered
        if self.logprobs and offered:
            raise UnsupportedParameter("'logprobs' together with 'tools' is not supported.", param="logprobs")
        if not offered:
            return
        self.check_end()
        bound, form = self.bound, self.form
        if bound is not None and (form is None or form.schema is None):
            raise UnsupportedParameter(f"'{bound}' together with 'tools' is not supported.", param=bound)
        if self.continue_final_message:
            text = "'continue_final_message' together with 'tools' is not supported."
            raise UnsupportedParameter(text, param="continue_final_message")

    @model_validator(mode="before")
    @classmethod
    def _refuse_by_name(cls, body: Any) -> Any:
        body = without_neutral(body, not_yet=CHAT_FIELDS)
        return _with_checked_messages(body)

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("'top_logprobs' is only allowed when 'logprobs' is true.", param="top_logprobs")
        return self


def _with_checked_messages(body: Any) -> Any:
    messages = body.get("messages") if isinstance(body, dict) else None
    if not isinstance(messages, list):
        return body
    return {**body, "messages": [_checked_message(message, f"messages[{i}]") for i, message in enumerate(messages)]}


def _checked_message(message: Any, where: str) -> Any:
    message = without_neutral(message, not_yet=MESSAGE_FIELDS, where=f"{where}.")
    if not isinstance(message, dict):
        return message
    if message.get("role") == "function":
        raise UnsupportedParameter(
            "Messages of role 'function' are not supported by this server, only the newer 'tool'.",
            param=f"{where}.role",
        )
    _check_tools(message, where)
    content = message.get("content")
    for i, part in enumerate(content if isinstance(content, list) else []):
        kind = part.get("type") if isinstance(part, dict) else "text"
        if isinstance(kind, str) and kind != "text":
            raise UnsupportedParameter(
                f"Content parts of type '{kind}' are not supported by this server, only 'text'.",
                param=f"{where}.content[{i}].type",
            )
    return message


def _check_tools(message: dict[str, Any], where: str) -> None:
    """Calls, their results and contents where they belong. What has a wrong type is pydantic's to refuse."""
    role = message.get("role")
    if role not in ("system", "developer", "user", "assistant", "tool"):
        return
    if message.get("tool_calls") and role != "assistant":
        raise InvalidRequest("Only messages of role 'assistant' have 'tool_calls'.", param=f"{where}.tool_calls")
    if (message.get("tool_call_id") is None) == (role == "tool"):
        text = "Messages of role 'tool', and no others, have a 'tool_call_id'."
        raise InvalidRequest(text, param=f"{where}.tool_call_id")
    if message.get("content") is None and not message.get("tool_calls"):
        raise InvalidRequest(f"'{where}.content' is missing.", param=f"{where}.content")


# One prompt or several; each a text or tokens.
Prompt = str | tuple[int, ...]


class CompletionRequest(Generating):
    """Body of POST /v1/completions. `prompt` is a text, a list of texts, tokens, or a list of lists of tokens."""

    prompt: Annotated[
        str
        | Annotated[tuple[int, ...], Field(min_length=1, strict=False)]
        | Annotated[tuple[str, ...], Field(min_length=1, strict=False)]
        | Annotated[
            tuple[Annotated[tuple[int, ...], Field(min_length=1, strict=False)], ...],
            Field(min_length=1, strict=False),
        ],
        Field(union_mode="left_to_right"),
    ]
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    add_special_tokens: bool | None = None
    max_tokens: int | None = Field(default=None, ge=0)  # none, where the prompt is to be read

    @property
    def echoes_logprobs(self) -> bool:
        """Whether the log probabilities are also the prompt's."""
        return bool(self.echo) and self.logprobs is not None

    @property
    def num_prompt_logprobs(self) -> int | None:
        """See `Generating`."""
        asked = (self.prompt_logprobs, self.logprobs if self.echo else None)
        return max((number for number in asked if number is not None), default=None)

    @property
    def prompts(self) -> list[Prompt]:
        """One or several."""
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else list(prompt)

    @property
    def token_limit(self) -> int:
        """See `Generating`."""
        return DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def num_top_logprobs(self) -> int | None:
        """See `Generating`."""
        return self.logprobs

    def check(self, limits: ServiceLimits) -> None:
        """See `Generating`."""
        super().check(limits)
        check_choices(self.n, num_prompts=len(self.prompts), limits=limits)

    @model_validator(mode="before")
    @classmethod
    def _refuse_by_name(cls, body: Any) -> Any:
        if isinstance(body, dict) and "prompt" in body:
            _check_prompt(body["prompt"])
        return without_neutral(body, not_yet=COMPLETION_FIELDS)

    @model_validator(mode="after")
    def _an_echo_is_whole(self) -> Self:
        if self.echo and self.truncate_prompt_tokens is not None:
            text = "'truncate_prompt_tokens' together with 'echo' is not supported."
            raise UnsupportedParameter(text, param="truncate_prompt_tokens")
        return self

    @model_validator(mode="after")
    def _no_tokens_only_of_a_prompt(self) -> Self:
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            text = "'max_tokens' may be 0 only with 'echo' or 'prompt_logprobs'."
            raise InvalidRequest(text, param="max_tokens")
        return self


def _check_prompt(prompt: Any) -> None:
    """One complaint of ours, where pydantic would have one for each of the four forms."""
    if isinstance(prompt, str):
        return
    if isinstance(prompt, list) and prompt:
        if all(isinstance(item, str) for item in prompt) or _are_ids(prompt):
            return
        if all(isinstance(item, list) and item and _are_ids(item) for item in prompt):
            return
    raise InvalidRequest(
        "'prompt' must be a text, a list of texts, a list of token ids, or a list of lists of token ids; none of them"
        " empty.",
        param="prompt",
    )


def _are_ids(items: list[Any]) -> bool:
    return all(type(item) is int and item >= 0 for item in items)


class TokenizeRequest(Templated):
    """Body of POST /tokenize, in vLLM's words (`prompt` or `messages`) or llama.cpp's (`content`)."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    content: str | None = None
    add_special: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_by_name(cls, body: Any) -> Any:
        return _with_checked_messages(body)

    @model_validator(mode="after")
    def _one_text(self) -> Self:
        given = [name for name in ("prompt", "messages", "content") if getattr(self, name) is not None]
        if len(given) != 1:
            raise InvalidRequest(
                "Give one of 'prompt', 'messages' and 'content'.", param=given[-1] if given else "prompt"
            )
        for option, belongs_to in _OPTION_OF.items():
            if getattr(self, option) and belongs_to != given[0]:
                raise InvalidRequest(f"'{option}' goes with '{belongs_to}', not with '{given[0]}'.", param=option)
        return self


_OPTION_OF = {
    "add_special_tokens": "prompt",
    "add_generation_prompt": "messages",
    "continue_final_message": "messages",
    "chat_template_kwargs": "messages",
    "add_special": "content",
}


class DetokenizeRequest(Body):
    """Body of POST /detokenize, in both dialects."""

    model: str | None = None
    tokens: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False)]
