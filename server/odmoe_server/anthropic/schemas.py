"""Bodies of POST /v1/messages and /v1/messages/count_tokens, as pydantic models. Knows shapes and ranges only.

Strict as OpenAI's are: types are not converted, unknown fields are refused, and fields that are known but not
implemented are refused by name unless they ask for nothing.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import Discriminator, Field, StringConstraints, Tag, model_validator

from odmoe_server.openai.body import Body
from odmoe_server.openai.errors import InvalidRequest, UnsupportedParameter
from odmoe_server.openai.fields import Neutral, without_neutral
from odmoe_server.openai.structured import JsonSchema, Name
from odmoe_server.openai.tools import MAX_TOOLS

MAX_STOPS: Final = 16
MAX_STOP_CHARS: Final = 1000

# Field -> the values that change nothing; null is always one of them. Thinking that is left to the model asks nothing
# of one that does not think.
FIELDS: Mapping[str, Neutral] = {
    "container": (),
    "context_management": (),
    "diagnostics": (),
    "inference_geo": (),
    "mcp_servers": ([],),
    "speed": ("standard",),
    "thinking": ({"type": "disabled"}, {"type": "adaptive"}),
    "user_profile_id": (),
    "workspace_id": (),
}
_TOOL_FIELDS: Mapping[str, Neutral] = {
    "allowed_callers": (["direct"],),
    "defer_loading": (False,),
    "eager_input_streaming": (True, False),  # arguments are streamed as they come
    "input_examples": ([],),
}
_OUTPUT_FIELDS: Mapping[str, Neutral] = {"effort": ()}
_BLOCK_FIELDS: Mapping[str, Neutral] = {"caller": ({"type": "direct"},), "citations": (), "toolset_name": ()}
_BLOCKS: Final = {"user": ("text", "tool_result"), "assistant": ("text", "tool_use")}


class CacheControl(Body):
    """A hint that changes no answer; prompt heads are kept without it."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class TextBlock(Body):
    """Text."""

    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None


def _kind(content: Any) -> str:
    return "(parts)" if isinstance(content, list | tuple) else "(text)"


# The tags show up in pydantic's error locations; the brackets tell them from field names.
Text = Annotated[
    Annotated[str, Tag("(text)")] | Annotated[tuple[TextBlock, ...], Field(strict=False), Tag("(parts)")],
    Discriminator(_kind),
]


class ToolUse(Body):
    """A call that the assistant made."""

    type: Literal["tool_use"]
    id: str
    name: Name
    input: dict[str, Any]
    cache_control: CacheControl | None = None


class ToolResult(Body):
    """What came of it."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: Text = ""
    is_error: bool | None = None
    cache_control: CacheControl | None = None


def _kind_of_block(block: Any) -> str:
    return f"({block.get('type') if isinstance(block, dict) else getattr(block, 'type', None)})"


Block = Annotated[
    Annotated[TextBlock, Tag("(text)")]
    | Annotated[ToolUse, Tag("(tool_use)")]
    | Annotated[ToolResult, Tag("(tool_result)")],
    Discriminator(_kind_of_block),
]
Blocks = Annotated[tuple[Block, ...], Field(min_length=1, strict=False)]


class Message(Body):
    """One turn."""

    role: Literal["user", "assistant"]
    content: Annotated[
        Annotated[str, Tag("(text)")] | Annotated[Blocks, Tag("(parts)")],
        Discriminator(_kind),
    ]


class Tool(Body):
    """A function the model may call."""

    name: Name
    input_schema: JsonSchema
    description: str | None = None
    type: Literal["custom"] | None = None
    strict: bool | None = None
    cache_control: CacheControl | None = None


class ToolChoice(Body):
    """Which tool, if any."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _a_name_goes_with_tool(self) -> "ToolChoice":
        if (self.name is None) == (self.type == "tool"):
            raise InvalidRequest("'tool_choice.name' is needed with type 'tool', and only there.", param="tool_choice")
        return self


class OutputFormat(Body):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    schema_: JsonSchema = Field(alias="schema")


class OutputConfig(Body):
    """The form of the answer."""

    format: OutputFormat | None = None


class Metadata(Body):
    """Who asks; not looked at."""

    user_id: str | None = None


class CountRequest(Body):
    """Body of POST /v1/messages/count_tokens: everything that becomes part of the prompt."""

    model: str
    messages: Annotated[tuple[Message, ...], Field(min_length=1, strict=False)]
    system: Text | None = None
    tools: Annotated[tuple[Tool, ...], Field(max_length=MAX_TOOLS, strict=False)] | None = None
    tool_choice: ToolChoice | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_by_name(cls, body: Any) -> Any:
        body = without_neutral(body, not_yet=FIELDS)
        if not isinstance(body, dict):
            return body
        output = without_neutral(body.get("output_config"), not_yet=_OUTPUT_FIELDS, where="output_config.")
        if output is not None:
            body["output_config"] = output
        for name, check in (("tools", _checked_tool), ("messages", _checked_message)):
            items = body.get(name)
            if isinstance(items, list):
                body[name] = [check(item, f"{name}[{i}]") for i, item in enumerate(items)]
        return body


StopSequence = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARS)]


class MessagesRequest(CountRequest):
    """Body of POST /v1/messages."""

    max_tokens: int = Field(ge=1)
    stop_sequences: Annotated[tuple[StopSequence, ...], Field(max_length=MAX_STOPS, strict=False)] | None = None
    stream: bool | None = None
    temperature: float | None = Field(default=None, ge=0, le=1)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None


def _checked_tool(tool: Any, where: str) -> Any:
    kind = tool.get("type") if isinstance(tool, dict) else None
    if isinstance(kind, str) and kind != "custom":
        raise UnsupportedParameter(
            f"Tools of type '{kind}' are not supported by this server, only 'custom'.", param=f"{where}.type"
        )
    return without_neutral(tool, not_yet=_TOOL_FIELDS, where=f"{where}.")


def _checked_message(message: Any, where: str) -> Any:
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, list):
        return message
    known = _BLOCKS.get(message.get("role"), ()) if isinstance(message.get("role"), str) else ()
    blocks = []
    for i, block in enumerate(content):
        at = f"{where}.content[{i}]"
        kind = block.get("type") if isinstance(block, dict) else None
        if known and isinstance(kind, str) and kind not in known:
            message_ = f"Blocks of type '{kind}' are not supported here by this server, only {' and '.join(known)}."
            raise UnsupportedParameter(message_, param=f"{at}.type")
        blocks.append(without_neutral(block, not_yet=_BLOCK_FIELDS, where=f"{at}."))
    return {**message, "content": blocks}
