"""What all request bodies have in common: strictness, and how pydantic's complaints become ours.

Types are not converted and unknown fields are refused. Knows pydantic and the error table; no field of any API.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from odmoe_server.openai.errors import InvalidRequest, MalformedBody, RequestError, UnknownParameter


class Body(BaseModel):
    """A JSON object a client sends."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


B = TypeVar("B", bound=BaseModel)


def parse(kind: type[B], body: bytes) -> B:
    """Reads a request body; everything wrong with it is a `RequestError` which names the field."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _first_problem(error) from None


def built(kind: type[B], fields: Mapping[str, Any]) -> B:
    """The same of a body we made ourselves out of another."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _first_problem(error) from None


def _first_problem(error: ValidationError) -> RequestError:
    problem = error.errors(include_url=False, include_input=False)[0]
    param = _param(problem["loc"])
    if problem["type"] == "json_invalid":
        return MalformedBody(f"The request body is not valid JSON: {problem['ctx']['error']}.")
    if not problem["loc"]:
        return MalformedBody("The request body must be a JSON object.")
    if problem["type"] == "extra_forbidden":
        return UnknownParameter(
            f"Unrecognized request argument supplied: '{param}'. This server refuses fields it does not know, also"
            " those which an SDK sends as extra_body, rather than ignore them.",
            param=param,
        )
    if problem["type"] == "missing":
        return InvalidRequest(f"Missing required parameter: '{param}'.", param=param)
    if problem["type"] == "too_short":
        return InvalidRequest(f"'{param}' must have {problem['ctx']['min_length']} or more items.", param=param)
    if problem["type"] == "too_long":
        return InvalidRequest(f"'{param}' must have at most {problem['ctx']['max_length']} items.", param=param)
    return InvalidRequest(f"Invalid value for '{param}': {problem['msg']}.", param=param)


def _param(location: tuple[int | str, ...]) -> str:
    """Pydantic's location as OpenAI writes it: messages[0].content[1].text"""
    param = ""
    for step in location:
        if isinstance(step, int):
            param += f"[{step}]"
        elif not step.startswith("("):
            param += f".{step}" if param else step
    return param
