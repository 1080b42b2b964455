"""Every way a request can go wrong, and the one table from there to a status and an OpenAI error body.

Knows exceptions, status codes and OpenAI's error shape. Does not know where they are raised, nor the engine's insides.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException

from odmoe_server.engine_api import GenerationFailed, NotReady, QueueFull, TooLarge
from odmoe_server.pump import NotBegun, NotEnded

NOT_READY_RETRY_S = 5
SHUTTING_DOWN = "The server is shutting down."
INTERNAL_MESSAGE = "The server failed while it processed this request. The log has the details under the request id."


class RequestError(Exception):
    """The client's mistake; `param` is the field it is in, as OpenAI writes it (`messages[0].content`)."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidRequest(RequestError):
    """A field has a value it cannot have."""


class UnsupportedParameter(RequestError):
    """A field of the OpenAI API which this server does not implement."""


class UnknownParameter(RequestError):
    """A field nobody has heard of."""


class MalformedBody(RequestError):
    """The body is not a JSON object, or does not say that it is JSON."""


class ContextTooLong(RequestError):
    """The prompt leaves no room for an answer."""


class BodyTooLarge(RequestError):
    """The body is larger than the server takes."""


class BodyTooSlow(RequestError):
    """The body did not arrive in time."""


class BadKey(RequestError):
    """No API key, or a wrong one."""


class UntrustedHost(RequestError):
    """A Host header this server does not answer to."""


class UnknownModel(RequestError):
    """A model name that is not served here."""


class UnknownResponse(RequestError):
    """A response that is not kept here."""


class UnknownRoute(RequestError):
    """No such address."""


class WrongMethod(RequestError):
    """The address exists, but not for this method."""


@dataclass(frozen=True)
class Row:
    """One line of the table: HTTP status, OpenAI error type and code."""

    status: int
    type: str
    code: str | None


_CLIENT = "invalid_request_error"

TABLE: Mapping[type[Exception], Row] = {
    InvalidRequest: Row(400, _CLIENT, "invalid_value"),
    UnsupportedParameter: Row(400, _CLIENT, "unsupported_parameter"),
    UnknownParameter: Row(400, _CLIENT, "unknown_parameter"),
    MalformedBody: Row(400, _CLIENT, "malformed_body"),
    TooLarge: Row(400, _CLIENT, "too_large"),
    ContextTooLong: Row(400, _CLIENT, "context_length_exceeded"),
    BadKey: Row(401, _CLIENT, "invalid_api_key"),
    UntrustedHost: Row(403, _CLIENT, "host_not_allowed"),
    UnknownModel: Row(404, _CLIENT, "model_not_found"),
    UnknownResponse: Row(404, _CLIENT, "response_not_found"),
    UnknownRoute: Row(404, _CLIENT, "unknown_url"),
    WrongMethod: Row(405, _CLIENT, "method_not_allowed"),
    BodyTooSlow: Row(408, _CLIENT, "request_timeout"),
    BodyTooLarge: Row(413, _CLIENT, "request_too_large"),
    QueueFull: Row(429, "rate_limit_error", "queue_full"),
    GenerationFailed: Row(500, "server_error", "generation_failed"),
    NotReady: Row(503, "server_error", "not_ready"),
    NotBegun: Row(503, "server_error", "queue_timeout"),
    NotEnded: Row(504, "server_error", "generation_timeout"),
}
_ANY_OTHER = Row(500, "server_error", "internal_error")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What the client gets to see of an exception."""

    status: int
    body: dict[str, dict[str, Any]]
    headers: dict[str, str]


def problem_of(error: Exception) -> Problem:
    """Status, OpenAI body and headers for any exception; those not in the table show nothing of their insides."""
    row = next((TABLE[kind] for kind in type(error).__mro__ if kind in TABLE), None)
    message = INTERNAL_MESSAGE if row is None else str(error)
    row = row or _ANY_OTHER
    detail = {"message": message, "type": row.type, "param": getattr(error, "param", None), "code": row.code}
    return Problem(status=row.status, body={"error": detail}, headers=_headers(error))


def _headers(error: Exception) -> dict[str, str]:
    match error:
        case QueueFull():
            return {"retry-after": str(max(1, math.ceil(error.retry_after_s)))}
        case NotReady() | NotBegun():
            return {"retry-after": str(NOT_READY_RETRY_S)}
        case BadKey():
            return {"www-authenticate": "Bearer"}
    return {}


def from_framework(error: HTTPException, *, method: str, path: str) -> RequestError:
    """The router's own refusals in our terms."""
    if error.status_code == 404:
        return UnknownRoute(
            f"Unknown request URL: {method} {path}.{_hint(path)} The routes are listed at /openapi.json."
        )
    if error.status_code == 405:
        return WrongMethod(f"{path} does not take {method}.")
    return InvalidRequest(str(error.detail))


def _hint(path: str) -> str:
    """What is often wrong with an address."""
    if path.startswith("/v1/v1/"):
        return " It has /v1 twice: clients that add it themselves want a base URL without."
    return " Leave out the slash at its end." if path.endswith("/") and path != "/" else ""
