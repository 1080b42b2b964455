"""Body of POST /v1/responses, as pydantic models. Knows shapes and ranges, and which fields are refused by name."""

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from odmoe_server.openai.body import Body
from odmoe_server.openai.errors import UnsupportedParameter
from odmoe_server.openai.fields import Neutral, without_neutral
from odmoe_server.openai.structured import JsonSchema, Name
from odmoe_server.openai.tools import MAX_TOOLS

# Field -> the values that change nothing; null is always one of them.
FIELDS: Mapping[str, Neutral] = {
    "access_programs": (),
    "background": (False,),
    "background_options": (),
    "context_management": (),
    "conversation": (),
    "image": (),
    "include": ([],),
    "max_tool_calls": (),
    "moderation": (),
    "prompt": (),
    "prompt_cache_options": (),
    "reasoning": ({}, {"effort": "none"}),
    "stream_options": ({}, {"include_obfuscation": False}),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}
_TEXT_FIELDS: Mapping[str, Neutral] = {"verbosity": ("medium",)}
_TOOL_FIELDS: Mapping[str, Neutral] = {"defer_loading": (False,)}
_ITEM_FIELDS: Mapping[str, Neutral] = {"async": (False,), "caller": (), "namespace": (), "phase": ()}
_ITEMS: Final = ("message", "function_call", "function_call_output")
_PARTS: Final = ("input_text", "output_text")

Status = Literal["in_progress", "completed", "incomplete"]


class TextPart(Body):
    """Text in a message; what else an answer had there says nothing to a model."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: tuple[Any, ...] | None = Field(default=None, strict=False)
    logprobs: tuple[Any, ...] | None = Field(default=None, strict=False)


Parts = Annotated[tuple[TextPart, ...], Field(strict=False)]
Content = Annotated[
    Annotated[str, Tag("(text)")] | Annotated[Parts, Tag("(parts)")],
    Discriminator(lambda content: "(parts)" if isinstance(content, list | tuple) else "(text)"),
]


class MessageItem(Body):
    """A message, also one that was an answer."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    id: str | None = None
    status: Status | None = None


class CallItem(Body):
    """A call that the model made; `arguments` is JSON in a string."""

    type: Literal["function_call"]
    call_id: str
    name: Name
    arguments: str
    id: str | None = None
    status: Status | None = None


class OutputItem(Body):
    """What came of it."""

    type: Literal["function_call_output"]
    call_id: str
    output: Content
    id: str | None = None
    status: Status | None = None


def _kind_of_item(item: Any) -> str:
    return f"({item.get('type') if isinstance(item, dict) else getattr(item, 'type', None)})"


Item = Annotated[
    Annotated[MessageItem, Tag("(message)")]
    | Annotated[CallItem, Tag("(function_call)")]
    | Annotated[OutputItem, Tag("(function_call_output)")],
    Discriminator(_kind_of_item),
]


class Tool(Body):
    """A function the model may call."""

    type: Literal["function"]
    name: Name
    parameters: JsonSchema | None = None
    description: str | None = None
    strict: bool | None = None


class NamedTool(Body):
    """This one and no other."""

    type: Literal["function"]
    name: str


class TextFormat(Body):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: Name | None = None
    schema_: JsonSchema | None = Field(default=None, alias="schema")
    description: str | None = None
    strict: bool | None = None


class TextOptions(Body):
    """Of the answer's text."""

    format: TextFormat = TextFormat()


class ResponsesRequest(Body):
    """Body of POST /v1/responses."""

    model: str
    input: Annotated[
        Annotated[str, Tag("(text)")] | Annotated[tuple[Item, ...], Field(min_length=1, strict=False), Tag("(items)")],
        Discriminator(lambda value: "(items)" if isinstance(value, list | tuple) else "(text)"),
    ]
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    parallel_tool_calls: bool | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    text: TextOptions | None = None
    tool_choice: (
        Annotated[
            Annotated[Literal["none", "auto", "required"], Tag("(word)")] | Annotated[NamedTool, Tag("(named)")],
            Discriminator(lambda choice: "(word)" if isinstance(choice, str) else "(named)"),
        ]
        | None
    ) = None
    tools: Annotated[tuple[Tool, ...], Field(max_length=MAX_TOOLS, strict=False)] | None = None
    # Accepted because they do not touch the answer.
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_by_name(cls, body: Any) -> Any:
        body = without_neutral(body, not_yet=FIELDS)
        if not isinstance(body, dict):
            return body
        if body.get("text") is not None:
            body["text"] = without_neutral(body["text"], not_yet=_TEXT_FIELDS, where="text.")
        for name, check in (("tools", _checked_tool), ("input", _checked_item)):
            items = body.get(name)
            if isinstance(items, list):
                body[name] = [check(item, f"{name}[{i}]") for i, item in enumerate(items)]
        choice = body.get("tool_choice")
        if isinstance(choice, dict):
            _refuse_kind(choice, known=("function",), what="Choices", where="tool_choice")
        return body


def _refuse_kind(value: Any, *, known: tuple[str, ...], what: str, where: str) -> None:
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind not in known:
        only = " and ".join(f"'{name}'" for name in known)
        raise UnsupportedParameter(
            f"{what} of type '{kind}' are not supported by this server, only {only}.", param=f"{where}.type"
        )


def _checked_tool(tool: Any, where: str) -> Any:
    _refuse_kind(tool, known=("function",), what="Tools", where=where)
    return without_neutral(tool, not_yet=_TOOL_FIELDS, where=f"{where}.")


def _checked_item(item: Any, where: str) -> Any:
    _refuse_kind(item, known=_ITEMS, what="Items", where=where)
    item = without_neutral(item, not_yet=_ITEM_FIELDS, where=f"{where}.")
    if not isinstance(item, dict):
        return item
    for name in ("content", "output"):
        parts = item.get(name)
        for i, part in enumerate(parts if isinstance(parts, list) else []):
            _refuse_kind(part, known=_PARTS, what="Parts", where=f"{where}.{name}[{i}]")
    return item if "type" in item else {"type": "message", **item}
