"""What a client may demand of an answer's form: `response_format`, and the JSON schemas in it and in tools.

Knows JSON schemas as data, their bounds, and how llguidance wants them written. Does not compile, and knows no model.

A schema is enforced as it stands, strict or not: a keyword that cannot be enforced is refused. The schemas of tools
that do not say `strict` are the exception. There such keywords are left out, as OpenAI does not enforce them either.
"""

import json
from typing import Annotated, Any, Final, Literal

from pydantic import Discriminator, Field, StringConstraints, Tag

from odmoe_server.openai.body import Body
from odmoe_server.openai.errors import InvalidRequest

MAX_SCHEMA_DEPTH: Final = 64
# Of values and patterns: what a long one costs grows with its square.
MAX_LITERAL_CHARS: Final = 4096
_LITERALS: Final = ("const", "enum", "pattern")
# One space, or a new line with its indentation, and never more of it: a model cannot get lost in whitespace.
WHITESPACE: Final = r"( |\n {0,16})?"

JsonSchema = dict[str, Any]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,128}$")]


class PlainText(Body):
    """No demand."""

    type: Literal["text"]


class AnyObject(Body):
    """Some JSON object."""

    type: Literal["json_object"]


class NamedSchema(Body):
    """A JSON schema and what it is called."""

    name: Name
    schema_: JsonSchema = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class OfSchema(Body):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


def _kind(form: Any) -> str | None:
    kind = form.get("type") if isinstance(form, dict) else getattr(form, "type", None)
    return f"({kind})"


ResponseFormat = Annotated[
    Annotated[PlainText, Tag("(text)")]
    | Annotated[AnyObject, Tag("(json_object)")]
    | Annotated[OfSchema, Tag("(json_schema)")],
    Discriminator(
        _kind,
        custom_error_type="unknown_type",
        custom_error_message="its 'type' must be 'text', 'json_object' or 'json_schema'",
    ),
]


def schema_of(form: PlainText | AnyObject | OfSchema | None) -> JsonSchema | None:
    """The schema an answer must follow; None if it may be anything."""
    match form:
        case AnyObject():
            return {"type": "object"}
        case OfSchema():
            return form.json_schema.schema_
    return None


def enforceable(schema: JsonSchema, *, param: str, max_bytes: int, lenient: bool = False) -> str:
    """The schema as llguidance takes it, with our rules of whitespace. Raises `InvalidRequest`, naming `param`, if it
    is too large or too deep."""
    if _depth(schema) > MAX_SCHEMA_DEPTH:
        raise InvalidRequest(f"'{param}' is nested more than {MAX_SCHEMA_DEPTH} levels deep.", param=param)
    if _longest_literal(schema) > MAX_LITERAL_CHARS:
        raise InvalidRequest(f"'{param}' has a value longer than {MAX_LITERAL_CHARS} characters.", param=param)
    options = {"whitespace_pattern": WHITESPACE, **({"lenient": True, "coerce_one_of": True} if lenient else {})}
    text = json.dumps({**schema, "x-guidance": options})
    if len(text) > max_bytes:
        raise InvalidRequest(f"'{param}' is larger than {max_bytes} bytes.", param=param)
    return text


def grammar_of_schema(schema: JsonSchema, *, param: str, max_bytes: int) -> str:
    """An answer that is JSON of this schema and nothing else, in llguidance's notation."""
    return f"%llguidance {{}}\nstart: %json {enforceable(schema, param=param, max_bytes=max_bytes)}\n"


def _longest_literal(value: Any, *, is_literal: bool = False) -> int:
    """Characters of the longest text that an answer may have to repeat; of a value that is not too deep."""
    if isinstance(value, str):
        return len(value) if is_literal else 0
    if isinstance(value, dict):
        longest = (_longest_literal(item, is_literal=is_literal or key in _LITERALS) for key, item in value.items())
        return max(longest, default=0)
    items = value if isinstance(value, list) else ()
    return max((_longest_literal(item, is_literal=is_literal) for item in items), default=0)


def _depth(value: Any) -> int:
    """Levels of a JSON value, at least one; looks no further than the bound, so that nothing recurses far."""
    level, depth = [value], 0
    while level and depth <= MAX_SCHEMA_DEPTH:
        depth += 1
        inner: list[Any] = []
        for item in level:
            inner += item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        level = inner
    return depth
