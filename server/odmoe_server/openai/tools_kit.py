"""What demands on an answer's form make of a request: a prompt that tells the tools, and a constraint of the answer.

Knows the text codec, grammars and the format of calls. Does not know requests nor how an answer is written.
"""

from collections.abc import Sequence
from typing import Any

from odmoe_server.engine_api import Constraint
from odmoe_server.grammars import GrammarError, Grammars
from odmoe_server.openai.errors import InvalidRequest
from odmoe_server.openai.forms import Form
from odmoe_server.openai.structured import grammar_of_schema
from odmoe_server.openai.tools import Tool, ToolOptions, check_schemas, grammar_of_calls
from odmoe_server.openai.tools_format import Message, ToolFormat, learn, plain
from odmoe_server.text import Rendering, TextCodec, TextError


class ToolKit:
    """Of one model. What is learnt of its chat template and its vocabulary is learnt at the first use."""

    def __init__(self, text: TextCodec, *, max_schema_bytes: int) -> None:
        self._text = text
        self._max_bytes = max_schema_bytes
        self._grammars = Grammars(text.backend, end_ids=text.end_ids)
        self._form: ToolFormat | None = None

    async def prompt_ids(
        self, messages: Sequence[Message], *, offered: Sequence[Tool] = (), rendering: Rendering | None = None
    ) -> tuple[int, ...]:
        """Token ids of a conversation in which tools may be told, called and answered. Raises `InvalidRequest`."""
        tools: list[dict[str, Any]] | None = [tool.for_template() for tool in offered] or None
        with_calls = any(message["role"] == "tool" or message.get("tool_calls") for message in messages)
        if (tools or with_calls) and not (await self.form()).native:
            messages, tools = plain(messages, tools or ()), None
        try:
            return await self._text.prompt_ids(messages, tools=tools, rendering=rendering)
        except TextError as error:
            param = "messages" if error.variable is None else f"chat_template_kwargs.{error.variable}"
            raise InvalidRequest(str(error), param=param) from error

    async def form(self) -> ToolFormat:
        """How this model writes calls."""
        if self._form is None:
            control_tokens = self._text.control_tokens
            self._form = await self._text.with_template(lambda render: learn(render, control_tokens=control_tokens))
        return self._form

    async def constraint(self, options: ToolOptions, *, form: Form | None) -> Constraint | None:
        """What the answer must follow: a form, calls, or one of the two. None if it is free. Raises `InvalidRequest`
        for what cannot be enforced, naming the field."""
        check_schemas(options.callable)
        if not options.callable:
            return None if form is None else await self._of_form(form)
        schema = None if form is None else form.schema
        calls = await self.form()
        begins_free = not options.must_call and schema is None
        param = "" if form is None else form.param
        grammar = grammar_of_calls(options, calls, max_bytes=self._max_bytes, otherwise=schema, param=param)
        try:
            return await self._grammars.compile(grammar, trigger=calls.trigger if begins_free else "")
        except GrammarError as error:
            await self._name_culprit(options, form)
            raise InvalidRequest(f"These tools cannot be enforced together: {error}", param="tools") from None

    async def _name_culprit(self, options: ToolOptions, form: Form | None) -> None:
        for tool in options.callable:
            position = options.tools.index(tool)
            alone = ToolOptions(tools=(tool,), choice="required", parallel=False)
            grammar = grammar_of_calls(alone, await self.form(), max_bytes=self._max_bytes)
            await self._of_form(Form(param=f"tools[{position}].function.parameters", grammar=grammar))
        if form is not None:
            await self._of_form(form)

    async def _of_form(self, form: Form) -> Constraint:
        grammar = form.grammar
        if form.schema is not None:
            grammar = grammar_of_schema(form.schema, param=form.param, max_bytes=self._max_bytes)
        try:
            return await self._grammars.compile(grammar, notation=form.notation)
        except GrammarError as error:
            raise InvalidRequest(f"'{form.param}' cannot be enforced: {error}.", param=form.param) from None
