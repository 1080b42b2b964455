"""Tools in requests: functions a model may call, and which of them it must. Knows shapes and names; not how a model
writes a call (`tools_format`) nor how that is read (`tools_parse`).
"""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal

from pydantic import Discriminator, Field, Tag

from odmoe_server.openai.body import Body
from odmoe_server.openai.errors import InvalidRequest
from odmoe_server.openai.structured import JsonSchema, Name, enforceable
from odmoe_server.openai.tools_format import ToolFormat

MAX_TOOLS: Final = 128
# In one answer. A model that finds no end must be stopped by something.
MAX_CALLS: Final = 16
_NOTHING: Final[JsonSchema] = {"type": "object", "properties": {}, "additionalProperties": False}


class Function(Body):
    """What a model may call."""

    name: Name
    description: str | None = None
    parameters: JsonSchema | None = None
    strict: bool | None = None

    @property
    def schema_(self) -> JsonSchema:
        """Of the arguments; a function without parameters takes an empty object."""
        return self.parameters or _NOTHING


class Tool(Body):
    """A function, as OpenAI wraps it."""

    type: Literal["function"]
    function: Function

    @property
    def schema_(self) -> JsonSchema:
        """Of the arguments, which are an object."""
        return {**self.function.schema_, "type": "object"}

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it."""
        function: dict[str, Any] = {"name": self.function.name}
        if self.function.description is not None:
            function["description"] = self.function.description
        return {"type": "function", "function": {**function, "parameters": self.function.schema_}}


class FunctionName(Body):
    """Which function."""

    name: str


class NamedTool(Body):
    """This one and no other."""

    type: Literal["function"]
    function: FunctionName


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("(word)")] | Annotated[NamedTool, Tag("(named)")],
    Discriminator(lambda choice: "(word)" if isinstance(choice, str) else "(named)"),
]


class CalledFunction(Body):
    """What was called, and with what; `arguments` is JSON in a string."""

    name: str
    arguments: str


class ToolCall(Body):
    """A call in the conversation so far."""

    id: str
    type: Literal["function"]
    function: CalledFunction

    def for_template(self, *, param: str) -> dict[str, Any]:
        """As chat templates expect it, with the arguments as an object. Raises `InvalidRequest` if they are none."""
        arguments = arguments_of(self.function.arguments, param=f"{param}.function.arguments")
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": function}


def arguments_of(text: str, *, param: str) -> dict[str, Any]:
    """The arguments of a call. Raises `InvalidRequest` if they are not a JSON object; nothing is an empty one."""
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError):
        raise InvalidRequest(f"'{param}' is not valid JSON.", param=param) from None
    if not isinstance(arguments, dict):
        raise InvalidRequest(f"'{param}' is not a JSON object.", param=param)
    return arguments


class ToolOptions(Body):
    """The tools of one request, checked against one another. Field names are those of the request."""

    tools: Annotated[tuple[Tool, ...], Field(max_length=MAX_TOOLS)] = ()
    choice: Literal["none", "auto", "required"] | NamedTool = "auto"
    parallel: bool = True

    def check(self) -> "ToolOptions":
        """Itself. Raises `InvalidRequest` for names that come twice or do not exist."""
        names = [tool.function.name for tool in self.tools]
        twice = next((i for i, name in enumerate(names) if name in names[:i]), None)
        if twice is not None:
            param = f"tools[{twice}].function.name"
            raise InvalidRequest(f"There is a tool named '{names[twice]}' already.", param=param)
        if self.choice == "required" and not self.tools:
            raise InvalidRequest("'tool_choice' is 'required', but there are no 'tools'.", param="tool_choice")
        if isinstance(self.choice, NamedTool) and self.choice.function.name not in names:
            message = f"'tool_choice' names '{self.choice.function.name}', which is not among the 'tools'."
            raise InvalidRequest(message, param="tool_choice.function.name")
        return self

    @property
    def offered(self) -> tuple[Tool, ...]:
        """The tools the model hears of."""
        return () if self.choice == "none" else self.tools

    @property
    def callable(self) -> tuple[Tool, ...]:
        """The tools it may call."""
        choice = self.choice
        if isinstance(choice, NamedTool):
            return tuple(tool for tool in self.tools if tool.function.name == choice.function.name)
        return self.offered

    @property
    def must_call(self) -> bool:
        """Whether the answer is nothing but calls."""
        return self.choice not in ("auto", "none")

    @property
    def most_calls(self) -> int:
        """In one answer."""
        return MAX_CALLS if self.parallel and not isinstance(self.choice, NamedTool) else 1


def grammar_of_calls(
    options: ToolOptions,
    form: ToolFormat,
    *,
    max_bytes: int,
    otherwise: JsonSchema | None = None,
    param: str = "response_format",
) -> str:
    """Calls of the tools that may be called, in llguidance's notation: from the answer's beginning if it must call or
    may be JSON of the schema `otherwise` (the field `param`), else from behind the format's trigger."""
    from_beginning = options.must_call or otherwise is not None
    begin = form.begin if from_beginning else form.begin.removeprefix(form.trigger)
    json_ = ""
    if otherwise is not None and not options.must_call:
        json_ = f" | %json {enforceable(otherwise, param=param, max_bytes=max_bytes)}"
    rules = []
    for i, tool in enumerate(options.callable):
        param = f"tools[{options.tools.index(tool)}].function.parameters"
        schema = enforceable(tool.schema_, param=param, max_bytes=max_bytes, lenient=not tool.function.strict)
        rules.append(f"tool_{i}: {_quoted(tool.function.name + form.middle)} %json {schema}")
    more = options.most_calls - 1
    repeated = f" ({_quoted(form.between)} call){{0,{more}}}" if more else ""
    return "\n".join(
        [
            "%llguidance {}",
            f"start: {_quoted(begin)} call{repeated} {_quoted(form.end)}{json_}",
            "call: " + " | ".join(f"tool_{i}" for i in range(len(rules))),
            *rules,
            "",
        ]
    )


def check_schemas(tools: Sequence[Tool]) -> None:
    """Raises `InvalidRequest` for parameters that are not an object's."""
    for i, tool in enumerate(tools):
        if tool.function.schema_.get("type", "object") != "object":
            param = f"tools[{i}].function.parameters.type"
            raise InvalidRequest("Parameters of a function are an object.", param=param)


def _quoted(text: str) -> str:
    return json.dumps(text)
