"""Whether there are traces: where the operator names a collector, and the packages are there to send them with.

Knows the option and OpenTelemetry's variables; imports OpenTelemetry only when it is wanted.
"""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from odmoe_server.tracing.spans import Tracing

log = logging.getLogger(__name__)

_VARIABLES: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_TRACES_PATH: Final = "/v1/traces"
_MISSING: Final = "needs OpenTelemetry, which is not installed: pip install 'odmoe[server,otel]'"


def open_tracing(endpoint: str | None, *, environ: Mapping[str, str]) -> "Tracing | None":
    """None when nobody asked for traces. Raises ValueError when the option asks and OpenTelemetry is missing; a
    variable may be set for every program of a machine, so there it is a warning."""
    variable = next((name for name in _VARIABLES if environ.get(name)), None)
    if endpoint is None and (variable is None or _is_off(environ)):
        return None
    try:
        from odmoe_server.tracing.spans import Tracing, exporter_to
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("opentelemetry"):
            raise
        if endpoint is not None:
            raise ValueError(f"--otlp-endpoint {_MISSING}") from None
        log.warning("%s is set, but sending traces %s", variable, _MISSING)
        return None
    return Tracing(exporter_to(None if endpoint is None else traces_url(endpoint)))


def traces_url(endpoint: str) -> str:
    """Where a collector at this address takes traces."""
    return endpoint if endpoint.endswith(_TRACES_PATH) else endpoint.rstrip("/") + _TRACES_PATH


def _is_off(environ: Mapping[str, str]) -> bool:
    return environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or environ.get("OTEL_TRACES_EXPORTER") == "none"
