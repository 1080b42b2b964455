"""/health, /metrics and /version: what machines ask a server about itself. Knows the engine's health only."""

from importlib.metadata import version
from typing import Any

from starlette.responses import JSONResponse, Response

from odmoe_server.engine_api import Engine, NodeHealth
from odmoe_server.metrics import CONTENT_TYPE, Metrics
from odmoe_server.openai.errors import NOT_READY_RETRY_S


def health(engine: Engine) -> Response:
    """200 if a request would be answered now, else 503; the body says how things stand either way."""
    now = engine.health()
    ready = now.state == "ready"
    body = {
        "status": "ok" if ready else "unavailable",
        "state": now.state,
        "detail": now.detail,
        "predictor_alive": now.predictor_alive,
        "running": now.running,
        "queued": now.queued,
        "nodes": [_node(node) for node in now.nodes],
    }
    if ready:
        return JSONResponse(body)
    return JSONResponse(body, status_code=503, headers={"retry-after": str(NOT_READY_RETRY_S)})


def _node(node: NodeHealth) -> dict[str, Any]:
    return {
        "id": node.peer_id,
        "role": node.role,
        "alive": node.alive,
        "slots": node.slots,
        "used_slots": node.used_slots,
    }


def metrics_page(metrics: Metrics) -> Response:
    """Prometheus text."""
    return Response(metrics.page(), headers={"content-type": CONTENT_TYPE})


def version_body() -> dict[str, str]:
    """The package's version."""
    return {"version": version("odmoe")}
