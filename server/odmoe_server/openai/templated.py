"""How a conversation becomes a prompt, as clients may say it: vLLM's fields. Knows names and bounds; not the template's
variables, which `text` knows."""

from collections.abc import Sequence
from typing import Any, Final

from pydantic import Field, field_validator

from odmoe_server.openai.body import Body
from odmoe_server.openai.errors import InvalidRequest
from odmoe_server.openai.tools_format import Message
from odmoe_server.text import Rendering

_MAX_VARIABLES: Final = 16
_MAX_CHARS: Final = 1000
_Value = bool | int | float | str | None


class Templated(Body):
    """Base of the requests whose messages go through the chat template."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, _Value] | None = Field(default=None, max_length=_MAX_VARIABLES)

    @field_validator("chat_template_kwargs", mode="before")
    @classmethod
    def _plain_values(cls, given: Any) -> Any:
        for name, value in given.items() if isinstance(given, dict) else ():
            if not isinstance(value, _Value) or (isinstance(value, str) and len(value) > _MAX_CHARS):
                param = f"chat_template_kwargs.{name}"
                text = f"'{param}' must be true, false, a number, or a text of at most {_MAX_CHARS} characters."
                raise InvalidRequest(text, param=param)
        return given

    def rendering(self, messages: Sequence[Message]) -> Rendering:
        """Raises InvalidRequest for what the last message is not fit for."""
        goes_on = bool(self.continue_final_message)
        if goes_on and self.add_generation_prompt:
            text = "'add_generation_prompt' and 'continue_final_message' cannot both be true."
            raise InvalidRequest(text, param="continue_final_message")
        last = messages[-1]
        if goes_on and (last["role"] != "assistant" or last.get("tool_calls") or not last["content"].strip()):
            text = "'continue_final_message' needs a last message of role 'assistant' with a text to go on with."
            raise InvalidRequest(text, param="continue_final_message")
        return Rendering(
            begins_answer=not goes_on and self.add_generation_prompt is not False,
            goes_on=goes_on,
            variables=self.chat_template_kwargs or {},
        )
