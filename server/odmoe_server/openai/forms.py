"""What an answer must be, in the words of OpenAI, vLLM, SGLang and llama.cpp: one field of a request may say it.

Knows names, shapes and bounds. Compiles nothing and knows no model; tools are `tools`' business.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final

from pydantic import Discriminator, Field, StringConstraints, Tag, field_validator

from odmoe_server.grammars import Notation
from odmoe_server.openai.body import Body
from odmoe_server.openai.errors import InvalidRequest
from odmoe_server.openai.fields import Neutral, without_neutral
from odmoe_server.openai.structured import MAX_LITERAL_CHARS, JsonSchema, OfSchema, ResponseFormat, schema_of

MAX_CHOICES: Final = 256
# Of a grammar: what reading one in GBNF costs grows with its square.
MAX_GRAMMAR_CHARS: Final = 16_384
STRUCTURED_FIELDS: Mapping[str, Neutral] = {
    "disable_additional_properties": (False,),
    "disable_any_whitespace": (False,),
    "disable_fallback": (True, False),  # there is nothing to fall back to
    "structural_tag": (),
    "whitespace_pattern": (),
}

# The latter is its JSON. As everywhere, tags in brackets are left out of the names of fields in complaints.
Schema = Annotated[
    Annotated[JsonSchema, Tag("(schema)")] | Annotated[str, Tag("(json)")],
    Discriminator(lambda value: "(json)" if isinstance(value, str) else "(schema)"),
]
Regex = Annotated[str, StringConstraints(min_length=1, max_length=MAX_LITERAL_CHARS)]
Grammar = Annotated[str, StringConstraints(min_length=1, max_length=MAX_GRAMMAR_CHARS)]
_Choice = Annotated[str, StringConstraints(min_length=1, max_length=MAX_LITERAL_CHARS)]
Choices = Annotated[tuple[_Choice, ...], Field(min_length=1, max_length=MAX_CHOICES, strict=False)]


@dataclass(frozen=True, kw_only=True)
class Form:
    """What the field `param` demands: JSON of a schema, or text of a grammar in some notation."""

    param: str
    schema: JsonSchema | None = None
    grammar: str = ""
    notation: Notation = "llguidance"


class StructuredOutputs(Body):
    """vLLM's: exactly one of these."""

    json_: Schema | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: Regex | None = None
    choice: Choices | None = None
    grammar: Grammar | None = None

    def form(self, param: str) -> Form | None:
        """What it demands. Raises InvalidRequest unless that is one thing."""
        found = [
            form
            for form in (
                _of_schema(self.json_, f"{param}.json"),
                Form(param=f"{param}.json_object", schema={"type": "object"}) if self.json_object else None,
                _of_regex(self.regex, f"{param}.regex"),
                _of_choices(self.choice, f"{param}.choice"),
                _of_grammar(self.grammar, f"{param}.grammar"),
            )
            if form is not None
        ]
        if len(found) != 1:
            text = f"'{param}' takes exactly one of 'json', 'json_object', 'regex', 'choice' and 'grammar'."
            raise InvalidRequest(text, param=param)
        return found[0]


class Formed(Body):
    """Base of the requests whose answers may have to have a form."""

    response_format: ResponseFormat | None = None
    # vLLM's, the newer way and the older ones.
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: Regex | None = None
    guided_choice: Choices | None = None
    guided_grammar: Grammar | None = None
    # SGLang's and llama.cpp's.
    json_schema: Schema | None = None
    regex: Regex | None = None
    ebnf: Grammar | None = None
    grammar: Grammar | None = None

    @field_validator("structured_outputs", mode="before")
    @classmethod
    def _structured_by_name(cls, asked: Any) -> Any:
        return without_neutral(asked, not_yet=STRUCTURED_FIELDS, where="structured_outputs.")

    @property
    def form(self) -> Form | None:
        """What the answer must be; None if it may be anything. Raises InvalidRequest for more than one demand."""
        found = list(self._forms())
        if len(found) > 1:
            text = f"'{found[0].param}' and '{found[1].param}' cannot both be followed. Leave one of them out."
            raise InvalidRequest(text, param=found[1].param)
        return found[0] if found else None

    def _forms(self) -> Iterator[Form]:
        asked = (
            _of_format(self.response_format),
            None if self.structured_outputs is None else self.structured_outputs.form("structured_outputs"),
            _of_schema(self.guided_json, "guided_json"),
            _of_regex(self.guided_regex, "guided_regex"),
            _of_choices(self.guided_choice, "guided_choice"),
            _of_grammar(self.guided_grammar, "guided_grammar"),
            _of_schema(self.json_schema, "json_schema"),
            _of_regex(self.regex, "regex"),
            _of_grammar(self.ebnf, "ebnf"),
            _of_grammar(self.grammar, "grammar"),
        )
        return (form for form in asked if form is not None)


def _of_format(asked: ResponseFormat | None) -> Form | None:
    schema = schema_of(asked)
    param = "response_format.json_schema.schema" if isinstance(asked, OfSchema) else "response_format"
    return None if schema is None else Form(param=param, schema=schema)


def _of_schema(asked: JsonSchema | str | None, param: str) -> Form | None:
    if not isinstance(asked, str):
        return None if asked is None else Form(param=param, schema=asked)
    try:
        schema = json.loads(asked)
    except (ValueError, RecursionError):
        raise InvalidRequest(f"'{param}' is not valid JSON.", param=param) from None
    if not isinstance(schema, dict):
        raise InvalidRequest(f"'{param}' is not a JSON object.", param=param)
    return Form(param=param, schema=schema)


def _of_regex(asked: str | None, param: str) -> Form | None:
    return None if asked is None else Form(param=param, grammar=asked, notation="regex")


def _of_choices(asked: tuple[str, ...] | None, param: str) -> Form | None:
    if asked is None:
        return None
    return Form(param=param, grammar=f"%llguidance {{}}\nstart: {' | '.join(json.dumps(text) for text in asked)}\n")


def _of_grammar(asked: str | None, param: str) -> Form | None:
    return None if asked is None else Form(param=param, grammar=asked, notation="lark or gbnf")
