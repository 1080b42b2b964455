"""How a model writes calls of tools: as its chat template does where that can be learnt, else in a format of our own.

A template that knows tools shows it by an example: two calls are rendered, and what stands before, between and behind
names and arguments is the format. So prompt, grammar and parser agree, and no family of models has code here. Templates
that write calls with control tokens, with call ids, or name and arguments in another order get the format of our own.

Our own is that of the Hermes models, which many others were trained on: tools are told in the system message, results
come as messages of the user.

Knows messages as chat templates take them, and a function that renders them. Knows no tokenizer.
"""

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final

from jinja2 import TemplateError

Message = dict[str, Any]
# Messages, tools, and whether the answer's beginning is added, to text.
Render = Callable[[Sequence[Message], Sequence[Message], bool], str]


@dataclass(frozen=True, kw_only=True)
class ToolFormat:
    """Calls are written as begin, name, middle, arguments; between, name, middle, arguments; and so on; end."""

    begin: str
    middle: str
    between: str
    end: str
    native: bool

    @property
    def trigger(self) -> str:
        """What nobody writes who does not mean to call a tool."""
        return self.begin.partition("{")[0].rstrip()

    def written(self, calls: Sequence[tuple[str, str]]) -> str:
        """Calls, given as names and JSON, as a model writes them."""
        return self.begin + self.between.join(f"{name}{self.middle}{json_}" for name, json_ in calls) + self.end


OWN: Final = ToolFormat(
    begin='<tool_call>\n{"name": "',
    middle='", "arguments": ',
    between='}\n</tool_call>\n<tool_call>\n{"name": "',
    end="}\n</tool_call>",
    native=False,
)
_SYSTEM: Final = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def plain(messages: Sequence[Message], tools: Sequence[Message]) -> list[Message]:
    """The same conversation for a template that knows no tools, in the format of our own."""
    result: list[Message] = []
    for message in messages:
        if message["role"] == "tool":
            text = f"<tool_response>\n{message['content']}\n</tool_response>"
            if result and result[-1].get("of_tools"):  # templates want user and assistant in turns
                result[-1]["content"] += f"\n{text}"
            else:
                result.append({"role": "user", "content": text, "of_tools": True})
        elif message.get("tool_calls"):
            calls = [(call["function"]["name"], _json(call["function"]["arguments"])) for call in message["tool_calls"]]
            text = "\n".join(part for part in (message.get("content"), OWN.written(calls)) if part)
            result.append({"role": "assistant", "content": text})
        else:
            result.append(dict(message))
    for message in result:
        message.pop("of_tools", None)
    return _told(result, tools) if tools else result


def _told(messages: list[Message], tools: Sequence[Message]) -> list[Message]:
    text = _SYSTEM.format(tools="\n".join(_json(tool) for tool in tools))
    if messages[0]["role"] in ("system", "developer"):
        first = {**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}
        return [first, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


# ------------------------------------------------------------------------------------------------ learning by example

_NAMES: Final = ("probe_first", "probe_second")
_KEY, _TEXT, _RESULT, _ID = "probe_key", "probe_text", "probe_result", "proberef"
_TOOLS: Final[list[Message]] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "probe",
            "parameters": {"type": "object", "properties": {_KEY: {"type": "string"}}},
        },
    }
    for name in _NAMES
]


def learn(render: Render, *, control_tokens: Collection[str]) -> ToolFormat:
    """The format of the template behind `render`, or our own."""
    try:
        found = _learnt(render)
    except (TemplateError, ValueError, TypeError, KeyError):  # it does not know tools, or wants them otherwise
        return OWN
    parts = (found.begin, found.middle, found.between, found.end)
    odd = any(token in part for part in parts for token in (_ID, *control_tokens))
    return OWN if odd or not found.trigger else found


def _learnt(render: Render) -> ToolFormat:
    """Raises ValueError where the template does not do what a template with tools does."""
    user: Message = {"role": "user", "content": "probe"}
    prompt = render([user], _TOOLS, True)

    def turn(message: Message) -> str:
        text = render([user, message], _TOOLS, False)
        if not text.startswith(prompt):
            raise ValueError("the answer does not go on where the prompt ends")
        return text[len(prompt) :]

    head, _, tail = turn({"role": "assistant", "content": _TEXT}).partition(_TEXT)
    one, two = (
        turn(_calls(_NAMES[:number])).removeprefix(head).removesuffix(tail) if tail else "" for number in (1, 2)
    )
    result = {"role": "tool", "tool_call_id": f"{_ID}0", "name": _NAMES[0], "content": _RESULT}
    if _NAMES[0] not in prompt or _RESULT not in render([user, _calls(_NAMES[:1]), result], _TOOLS, True):
        raise ValueError("tools or their results are not shown")
    begin, middle, end = _cut(one, _NAMES[0])
    first, middle_2, rest = _cut(two, _NAMES[0])
    between, middle_3, end_2 = _cut(rest, _NAMES[1])
    if (first, middle_2, middle_3, end_2) != (begin, middle, middle, end) or not middle:
        raise ValueError("calls are not written one like the other")
    return ToolFormat(begin=begin.lstrip(), middle=middle, between=between, end=end, native=True)


def _calls(names: Sequence[str]) -> Message:
    calls = [
        {"id": f"{_ID}{i}", "type": "function", "function": {"name": name, "arguments": {_KEY: name[::-1]}}}
        for i, name in enumerate(names)
    ]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def _cut(text: str, name: str) -> tuple[str, str, str]:
    """What is before the name, between it and the arguments, and behind them. Raises ValueError if one is missing."""
    before, found, rest = text.partition(name)
    start = rest.rindex("{", 0, rest.index(f'"{_KEY}"'))
    end = rest.index("}", start) + 1
    if not found or json.loads(rest[start:end]) != {_KEY: name[::-1]}:
        raise ValueError("name and arguments are not written as JSON")
    return before, rest[:start], rest[end:]
