"""From requests for responses to chat requests, which is what is answered. Pure; knows the shapes of both."""

from collections.abc import Iterator, Sequence
from typing import Any

from odmoe_server.openai.errors import InvalidRequest
from odmoe_server.openai.responses_schemas import (
    CallItem,
    Item,
    MessageItem,
    NamedTool,
    OutputItem,
    ResponsesRequest,
    TextFormat,
    TextPart,
)
from odmoe_server.openai.tools import arguments_of

ChatMessages = list[dict[str, Any]]


def own_messages(asked: ResponsesRequest) -> ChatMessages:
    """The request's input as chat messages, without its instructions."""
    if isinstance(asked.input, str):
        return [{"role": "user", "content": asked.input}]
    return list(_messages(asked.input))


def chat_body(asked: ResponsesRequest, *, messages: ChatMessages) -> dict[str, Any]:
    """The body of a chat request that asks for the same; `messages` are those of the whole conversation. Raises
    `InvalidRequest` for a format that lacks its schema."""
    told = [] if asked.instructions is None else [{"role": "system", "content": asked.instructions}]
    body: dict[str, Any] = {"model": asked.model, "messages": [*told, *messages]}
    names = {"temperature": "temperature", "top_p": "top_p", "max_output_tokens": "max_completion_tokens"}
    body |= {theirs: value for ours, theirs in names.items() if (value := getattr(asked, ours)) is not None}
    if asked.text is not None:
        body["response_format"] = _format(asked.text.format)
    if asked.tools:
        body["tools"] = [
            {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}
            for tool in asked.tools
        ]
    choice = asked.tool_choice
    if isinstance(choice, NamedTool):
        body["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
    elif choice is not None:
        body["tool_choice"] = choice
    if asked.parallel_tool_calls is not None:
        body["parallel_tool_calls"] = asked.parallel_tool_calls
    return body


def answered(text: str, calls: Sequence[tuple[str, str, str]]) -> ChatMessages:
    """An answer as a message of the conversation to come; calls are (id, name, arguments)."""
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if calls:
        message["tool_calls"] = [
            {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
            for call_id, name, arguments in calls
        ]
    return [message]


def _format(form: TextFormat) -> dict[str, Any]:
    if form.type != "json_schema":
        extra = [name for name in ("name", "schema_", "description", "strict") if getattr(form, name) is not None]
        if extra:
            param = f"text.format.{extra[0].rstrip('_')}"
            raise InvalidRequest(f"'{param}' is only allowed with the type 'json_schema'.", param=param)
        return {"type": form.type}
    missing = "name" if form.name is None else "schema" if form.schema_ is None else None
    if missing:
        raise InvalidRequest(f"'text.format.{missing}' is missing.", param=f"text.format.{missing}")
    schema = form.model_dump(by_alias=True, exclude={"type"}, exclude_none=True)
    return {"type": "json_schema", "json_schema": schema}


def _messages(items: Sequence[Item]) -> Iterator[dict[str, Any]]:
    """Calls belong to the message of the assistant before them, or make one. Raises `InvalidRequest` for arguments that
    are not an object."""
    waiting: dict[str, Any] | None = None
    for i, item in enumerate(items):
        if isinstance(item, CallItem):
            arguments_of(item.arguments, param=f"input[{i}].arguments")
            waiting = waiting or {"role": "assistant", "content": ""}
            function = {"name": item.name, "arguments": item.arguments}
            waiting.setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": function})
            continue
        if waiting is not None:
            yield waiting
            waiting = None
        message = _message(item)
        if message["role"] == "assistant":
            waiting = message
        else:
            yield message
    if waiting is not None:
        yield waiting


def _message(item: MessageItem | OutputItem) -> dict[str, Any]:
    if isinstance(item, OutputItem):
        return {"role": "tool", "tool_call_id": item.call_id, "content": _joined(item.output)}
    return {"role": item.role, "content": _joined(item.content)}


def _joined(content: str | Sequence[TextPart]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)
