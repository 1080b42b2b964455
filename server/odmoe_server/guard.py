"""What every request passes before it reaches a route: a request id, the Host header, the API key, and the access log
afterwards.

Knows ASGI and keys. Does not know routes, apart from those that need no key, nor what is in a body: no prompt is
ever logged.
"""

import asyncio
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from odmoe_server.anthropic.errors import error_body
from odmoe_server.engine_api import NotReady
from odmoe_server.hosts import is_allowed
from odmoe_server.metrics import Metrics
from odmoe_server.openai.errors import SHUTTING_DOWN, BadKey, UntrustedHost, problem_of
from odmoe_wire import logs

access_log = logging.getLogger("odmoe_server.access")
log = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready"})
PAGE_PATH = "/"  # the status page as such, on which the key can be entered; it has no figures
# Asked for every few seconds, so of no interest in a log.
PROBE_PATHS = OPEN_PATHS | {"/metrics"}
REQUEST_ID_HEADER = "x-request-id"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


class Guard:
    """The outermost layer of the application. Without `keys` everyone may come in; `hosts` are the names it answers
    to."""

    def __init__(self, app: ASGIApp, *, keys: Sequence[str], hosts: Sequence[str], metrics: Metrics) -> None:
        self._app = app
        self._hosts = tuple(hosts)
        self._keys = tuple(key.encode() for key in keys)
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "HEAD" and scope["path"] in PROBE_PATHS:
            scope = {**scope, "method": "GET"}  # the web server sends no body
        headers = Headers(scope=scope)
        passage = _Passage(scope, send, request_id=_request_id(headers))
        try:
            self._check_host(headers)
            self._check_key(scope, headers)
            await self._app(scope, receive, passage.send)
        except (UntrustedHost, BadKey) as error:
            await passage.answer(error)
        except asyncio.CancelledError:  # the time for draining is over
            if passage.status is None:
                await passage.answer(NotReady(SHUTTING_DOWN))
            raise
        except Exception as error:  # the outermost loop: the client gets an answer whatever happens
            log.exception("request %s failed", passage.request_id)
            if passage.status is None:
                await passage.answer(error)
        finally:
            passage.log()
            self._metrics.http_answer(handler=_handler(scope), method=scope["method"], status=passage.status or 499)

    def _check_host(self, headers: Headers) -> None:
        """Raises UntrustedHost."""
        if not is_allowed(headers.get("host"), self._hosts):
            raise UntrustedHost("This server does not answer to that Host name; --allowed-hosts says to which it does.")

    def _check_key(self, scope: Scope, headers: Headers) -> None:
        """Raises BadKey. Of requests with a key, says in the scope's state whose they are, without the key."""
        # scope["path"] is what the router matches; request.url is made from the Host header, which clients choose.
        if not self._keys or scope["path"] in OPEN_PATHS | {PAGE_PATH}:
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        matches = [hmac.compare_digest(given.encode(), key) for key in self._keys]
        if not any(matches):
            raise BadKey("Incorrect API key provided. Send it as 'Authorization: Bearer KEY'.")
        scope["state"]["tenant"] = f"key-{matches.index(True)}"


class _Passage:
    """One request on its way through: its id, its status and its time."""

    def __init__(self, scope: Scope, send: Send, *, request_id: str) -> None:
        self.request_id = request_id
        self.status: int | None = None
        self._scope = scope
        self._send = send
        self._started_s = time.perf_counter()
        scope.setdefault("state", {})["request_id"] = request_id
        logs.request_id.set(request_id)  # of this request's task and those it starts

    async def send(self, message: Message) -> None:
        """To the client, with the request id among the headers."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)[REQUEST_ID_HEADER] = self.request_id
        await self._send(message)

    async def answer(self, error: Exception) -> None:
        """An error body, from outside of any route."""
        problem = problem_of(error)
        body = error_body(problem, path=self._scope["path"], request_id=self.request_id)
        content = json.dumps(body).encode()
        headers = {"content-type": "application/json", "content-length": str(len(content)), **problem.headers}
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": problem.status, "headers": raw})
        await self.send({"type": "http.response.body", "body": content})

    def log(self) -> None:
        """One line, without query, body or prompt."""
        client = self._scope.get("client") or ("-", 0)
        access_log.log(
            logging.DEBUG if self._scope["path"] in PROBE_PATHS else logging.INFO,
            "%s %r %s %.1f ms client=%s id=%s answer=%s",
            self._scope["method"],
            self._scope["path"],
            self.status or "client gone",
            (time.perf_counter() - self._started_s) * 1000,
            client[0],
            self.request_id,
            self._scope["state"].get("answer_id", "-"),
            extra=self._fields(client[0]),
        )

    def _fields(self, client: str) -> dict[str, Any]:
        return logs.fields(
            method=self._scope["method"],
            path=self._scope["path"],
            status=self.status,
            took_s=round(time.perf_counter() - self._started_s, 4),
            client=client,
            answer_id=self._scope["state"].get("answer_id"),
        )


def _request_id(headers: Headers) -> str:
    given = headers.get(REQUEST_ID_HEADER, "")
    return given if _REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"


def _handler(scope: Scope) -> str:
    return getattr(scope.get("route"), "path", "unknown")
