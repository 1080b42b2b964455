"""How every role logs: one line each, to stderr, for people or (`json`) for machines. Knows no role.

A line written while a request is handled carries its id. What a line is about comes as fields of their own in JSON; no
prompt and no answer is ever among them.
"""

import json
import logging
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Final, Literal

LogFormat = Literal["text", "json"]

request_id: ContextVar[str] = ContextVar("request_id", default="")

_TEXT: Final = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
# Talkative at info, of no interest to who runs a server.
_QUIET: Final = ("httpx", "huggingface_hub", "filelock", "uvicorn.error")
_FIELDS: Final = "fields"


def fields(**values: str | float | None) -> dict[str, Any]:
    """For `extra`: what a line is about, as fields of the JSON line; those that are None are left out."""
    return {_FIELDS: {name: value for name, value in values.items() if value is not None}}


def configure(level: str, log_format: LogFormat, *, role: str) -> None:
    """Set up the root logger; called once, at the start of a process."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines(role) if log_format == "json" else logging.Formatter(_TEXT, datefmt="%H:%M:%S"))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))


class JsonLines(logging.Formatter):
    """One JSON object a line: time (UTC), level, role, logger, message, the request's id if there is one, fields, and
    the trace of an exception."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, tz=UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "role": self._role,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if current := request_id.get():
            line["request_id"] = current
        line.update(getattr(record, _FIELDS, {}))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)
