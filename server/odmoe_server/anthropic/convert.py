"""From Anthropic's requests to OpenAI's, which is what is answered. Pure; knows the shapes of both."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

from odmoe_server.anthropic.schemas import CountRequest, Message, MessagesRequest, TextBlock, ToolResult, ToolUse
from odmoe_server.openai.errors import RequestError, UnsupportedParameter
from odmoe_server.openai.renamed import renamed

_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def chat_body(asked: CountRequest) -> dict[str, Any]:
    """The body of a chat request that asks for the same. Raises `UnsupportedParameter` for an answer begun by the
    client."""
    if asked.messages[-1].role == "assistant":
        raise UnsupportedParameter(
            "The last message must be the user's: this server does not go on with an answer that was begun.",
            param=f"messages[{len(asked.messages) - 1}].role",
        )
    body: dict[str, Any] = {"model": asked.model, "messages": list(_messages(asked)), **_tools(asked)}
    if asked.output_config is not None and asked.output_config.format is not None:
        schema = {"name": "output", "schema": asked.output_config.format.schema_}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    if isinstance(asked, MessagesRequest):
        fields = ("max_tokens", "temperature", "top_p", "top_k")
        body |= {name: value for name in fields if (value := getattr(asked, name)) is not None}
        if asked.stop_sequences:
            body["stop"] = list(asked.stop_sequences)
    return body


def _tools(asked: CountRequest) -> dict[str, Any]:
    body: dict[str, Any] = {}
    if asked.tools:
        body["tools"] = [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    "parameters": tool.input_schema,
                    **({"description": tool.description} if tool.description is not None else {}),
                    **({"strict": tool.strict} if tool.strict is not None else {}),
                },
            }
            for tool in asked.tools
        ]
    choice = asked.tool_choice
    if choice is not None:
        named = {"type": "function", "function": {"name": choice.name}}
        body["tool_choice"] = named if choice.type == "tool" else _CHOICES[choice.type]
        if choice.disable_parallel_tool_use:
            body["parallel_tool_calls"] = False
    return body


def _messages(asked: CountRequest) -> Iterator[dict[str, Any]]:
    if asked.system:
        yield {"role": "system", "content": _joined(asked.system)}
    # Turns of the same role in a row are one turn.
    for role, turns in groupby(asked.messages, key=lambda message: message.role):
        blocks = [block for turn in turns for block in _blocks(turn)]
        yield from _of_assistant(blocks) if role == "assistant" else _of_user(blocks)


def _blocks(message: Message) -> Sequence[TextBlock | ToolUse | ToolResult]:
    if isinstance(message.content, str):
        return (TextBlock(type="text", text=message.content),)
    return message.content


def _of_user(blocks: Sequence[TextBlock | ToolUse | ToolResult]) -> Iterator[dict[str, Any]]:
    for is_result, group in groupby(blocks, key=lambda block: isinstance(block, ToolResult)):
        if is_result:
            for block in group:
                assert isinstance(block, ToolResult)
                text = f"Error: {_joined(block.content)}" if block.is_error else _joined(block.content)
                yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": text}
        else:
            yield {"role": "user", "content": _joined(tuple(block for block in group if isinstance(block, TextBlock)))}


def _of_assistant(blocks: Sequence[TextBlock | ToolUse | ToolResult]) -> Iterator[dict[str, Any]]:
    text = _joined(tuple(block for block in blocks if isinstance(block, TextBlock)))
    calls = [
        {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": json.dumps(block.input)}}
        for block in blocks
        if isinstance(block, ToolUse)
    ]
    yield (
        {"role": "assistant", "content": text, "tool_calls": calls}
        if calls
        else {
            "role": "assistant",
            "content": text,
        }
    )


def _joined(content: str | Sequence[TextBlock]) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content)


# What the chat request calls a field, and what the client does.
_FIELDS = {
    "response_format.json_schema.schema": "output_config.format.schema",
    "function.parameters": "input_schema",
    "tool_choice.function.name": "tool_choice.name",
}


@contextmanager
def in_our_words() -> Iterator[None]:
    """Complaints about the chat request become complaints about Anthropic's."""
    try:
        yield
    except RequestError as error:
        raise renamed(error, _FIELDS) from None
