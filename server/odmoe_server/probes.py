"""What machines ask a server about itself: health, load, cluster, metrics, version. Knows the engine's health only."""

from importlib.metadata import version
from typing import Any

from starlette.responses import JSONResponse, Response

from odmoe_server.catalog import Catalog
from odmoe_server.engine_api import Engine, EngineHealth, ExpertStats, NodeHealth
from odmoe_server.metrics import CONTENT_TYPE, Metrics
from odmoe_server.openai.errors import NOT_READY_RETRY_S


def health(engine: Engine) -> Response:
    """200 if a request would be answered now, else 503; the body says how things stand either way."""
    now = engine.health()
    return _by_state(_state(now) | {"nodes": [_node(node) for node in now.nodes]}, ok=now.state == "ready")


def live(engine: Engine) -> Response:
    """200 unless only a restart can help."""
    now = engine.health()
    return _by_state({"status": now.state}, ok=now.state != "dead")


def _by_state(body: dict[str, Any], *, ok: bool) -> Response:
    if ok:
        return JSONResponse(body)
    return JSONResponse(body, status_code=503, headers={"retry-after": str(NOT_READY_RETRY_S)})


def _state(now: EngineHealth) -> dict[str, Any]:
    return {
        "status": "ok" if now.state == "ready" else "unavailable",
        "state": now.state,
        "detail": now.detail,
        "predictor_alive": now.predictor_alive,
        "running": now.running,
        "queued": now.queued,
    }


def _node(node: NodeHealth) -> dict[str, Any]:
    return {
        "id": node.peer_id,
        "role": node.role,
        "alive": node.alive,
        "slots": node.slots,
        "used_slots": node.used_slots,
    }


def load(engine: Engine) -> dict[str, int]:
    """How many requests there are; `server_load` is vLLM's name for all of them."""
    now = engine.health()
    return {"server_load": now.running + now.queued, "running": now.running, "queued": now.queued}


def stats(engine: Engine) -> dict[str, Any]:
    """What the engine has counted since it started."""
    now = engine.health()
    return {
        **_state(now),
        "prompt_tokens_total": now.prompt_tokens_total,
        "generation_tokens_total": now.generation_tokens_total,
        "failures_total": now.failures_total,
        "failovers_total": now.failovers_total,
        "protocol_errors_total": now.protocol_errors_total,
        "experts": _experts(now.totals),
        "nodes": [_node(node) | _node_totals(node) for node in now.nodes],
    }


def _experts(totals: ExpertStats) -> dict[str, Any]:
    used = totals.activations
    return {
        "activations": used,
        "predicted": totals.predicted,
        "predicted_late": totals.predicted_late,
        "hit": totals.hit,
        "late": totals.late,
        "missed": totals.missed,
        "substituted": totals.substituted,
        "hit_rate": totals.hit / used if used else None,
        "prediction_recall": (totals.predicted + totals.predicted_late) / used if used else None,
        "wait_s": totals.wait_s,
        "stall_s": totals.stall_s,
    }


def _node_totals(node: NodeHealth) -> dict[str, Any]:
    return {
        "accounted_bytes": node.accounted_bytes,
        "budget_bytes": node.budget_bytes,
        "rss_bytes": node.rss_bytes,
        "loads_total": node.loads_total,
        "loads_unused_total": node.loads_unused_total,
        "load_bytes_total": node.load_bytes_total,
        "load_s_total": node.load_s_total,
        "compute_s_total": node.compute_s_total,
    }


def cluster(engine: Engine, catalog: Catalog) -> dict[str, Any]:
    """Who serves, and what."""
    now = engine.health()
    return {
        "state": now.state,
        "model": catalog.names[0],
        "model_fingerprint": catalog.fingerprint,
        "max_model_len": catalog.context_length,
        "predictor_alive": now.predictor_alive,
        "nodes": [_node(node) for node in now.nodes],
    }


def metrics_page(metrics: Metrics) -> Response:
    """Prometheus text."""
    return Response(metrics.page(), headers={"content-type": CONTENT_TYPE})


def version_body() -> dict[str, str]:
    """The package's version."""
    return {"version": version("odmoe")}
