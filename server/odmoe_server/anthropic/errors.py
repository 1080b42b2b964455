"""Errors in Anthropic's shape. Knows the one table of problems and which addresses are Anthropic's."""

from typing import Any, Final

from odmoe_server.openai.errors import Problem

PREFIX: Final = "/v1/messages"
_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def error_body(problem: Problem, *, path: str, request_id: str) -> dict[str, Any]:
    """The body of an answer that is not a success, in the shape which clients of `path` expect."""
    if path != PREFIX and not path.startswith(f"{PREFIX}/"):
        return problem.body
    return anthropic_body(problem, request_id=request_id)


def anthropic_body(problem: Problem, *, request_id: str) -> dict[str, Any]:
    """A problem as Anthropic's SDKs read it; the message names the field."""
    kind = _TYPES.get(problem.status, "api_error")
    error = {"type": kind, "message": problem.body["error"]["message"]}
    return {"type": "error", "error": error, "request_id": request_id}
