"""Messages of a request as chat templates take them, and what calls and their results must have to do with one another.

Knows the shapes on both sides.
"""

from collections.abc import Sequence

from odmoe_server.openai.errors import InvalidRequest
from odmoe_server.openai.schemas import ChatMessage
from odmoe_server.openai.tools_format import Message


def for_template(messages: Sequence[ChatMessage]) -> list[Message]:
    """Raises `InvalidRequest` for the result of a call that nobody made, and for arguments that are not an object."""
    found: list[Message] = []
    names: dict[str, str] = {}
    for i, message in enumerate(messages):
        told: Message = {"role": message.role, "content": message.text()}
        if message.tool_calls:
            told["tool_calls"] = [
                call.for_template(param=f"messages[{i}].tool_calls[{j}]") for j, call in enumerate(message.tool_calls)
            ]
            names |= {call.id: call.function.name for call in message.tool_calls}
        if message.tool_call_id is not None:
            if message.tool_call_id not in names:
                param = f"messages[{i}].tool_call_id"
                raise InvalidRequest(f"There is no call '{message.tool_call_id}' before its result.", param=param)
            told |= {"tool_call_id": message.tool_call_id, "name": names[message.tool_call_id]}
        found.append(told)
    return found
