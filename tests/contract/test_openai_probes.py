"""Models, health, metrics, version, keys, request ids and the access log."""

import logging
import re
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from odmoe_server.engine_api import ExpertStats, GenerationFailed
from support.http_app import ALIAS, CHAT, MODEL, app_of, asking, request
from support.scripted_engine import READY, ScriptedEngine, words

OPENAI_FIELDS = {"id", "object", "created", "owned_by"}


def test_the_models() -> None:
    body = request(app_of(ScriptedEngine()), "GET", "/v1/models").json()
    assert body["object"] == "list"
    assert [model["id"] for model in body["data"]] == [MODEL, ALIAS]
    assert all(set(model) >= OPENAI_FIELDS for model in body["data"])
    assert {(model["root"], model["max_model_len"]) for model in body["data"]} == {(MODEL, 512)}


@pytest.mark.parametrize("name", [MODEL, ALIAS])
def test_one_model(name: str) -> None:
    body = request(app_of(ScriptedEngine()), "GET", f"/v1/models/{name}").json()
    assert body["id"] == name
    assert body["object"] == "model"


def test_a_model_that_is_not_there() -> None:
    answer = request(app_of(ScriptedEngine()), "GET", "/v1/models/other")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"


def test_health_when_ready() -> None:
    answer = request(app_of(ScriptedEngine()), "GET", "/health")
    assert answer.status_code == 200
    assert answer.json() == {
        "status": "ok",
        "state": "ready",
        "detail": "ready",
        "predictor_alive": True,
        "running": 1,
        "queued": 2,
        "nodes": [{"id": "node-0", "role": "node", "alive": True, "slots": 4, "used_slots": 1}],
    }


@pytest.mark.parametrize("state", ["loading", "waiting", "stopping", "dead"])
def test_health_when_not_ready(state: str) -> None:
    engine = ScriptedEngine()
    engine.unready(state, "in words")
    answer = request(app_of(engine), "GET", "/health")
    assert answer.status_code == 503
    assert answer.headers["retry-after"]
    assert (answer.json()["state"], answer.json()["detail"]) == (state, "in words")


def test_version() -> None:
    assert re.fullmatch(r"\d+\.\d+.*", request(app_of(ScriptedEngine()), "GET", "/version").json()["version"])


def samples(app: Any) -> dict[tuple[str, frozenset[str]], float]:
    """All samples by name and label values."""
    answer = request(app, "GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, frozenset(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


@pytest.mark.parametrize(
    ("name", "labels", "value"),
    [
        ("num_requests_running", {MODEL}, 1),
        ("num_requests_waiting", {MODEL}, 2),
        ("prompt_tokens_total", {MODEL}, 11),
        ("generation_tokens_total", {MODEL}, 22),
        ("engine_state", {"ready"}, 1),
        ("engine_state", {"loading"}, 0),
        ("expert_activations_total", {MODEL}, 10),
        ("expert_activations_predicted_total", {MODEL}, 9),
        ("expert_predictions_total", {"hit"}, 7),
        ("expert_predictions_total", {"late"}, 2),
        ("expert_predictions_total", {"miss"}, 1),
        ("expert_prediction_recall", {MODEL}, 0.9),
        ("expert_wait_seconds_total", {MODEL}, 0.125),
        ("failovers_total", {MODEL}, 3),
        ("protocol_errors_total", {MODEL}, 4),
        ("failures_total", {MODEL}, 5),
        ("predictor_up", {MODEL}, 1),
        ("node_up", {"node-0", "node"}, 1),
        ("expert_slots", {"node-0", "used"}, 1),
        ("expert_slots", {"node-0", "free"}, 3),
        ("expert_accounted_bytes", {"node-0"}, 1000),
        ("expert_budget_bytes", {"node-0"}, 4000),
        ("node_rss_bytes", {"node-0"}, 5000),
        ("expert_loads_total", {"node-0"}, 7),
        ("expert_loads_unused_total", {"node-0"}, 2),
        ("expert_load_bytes_total", {"node-0"}, 7000),
        ("expert_load_seconds_total", {"node-0"}, 0.5),
        ("expert_compute_seconds_total", {"node-0"}, 0.25),
    ],
)
def test_metrics_tell_the_engines_health(name: str, labels: set[str], value: float) -> None:
    found = samples(app_of(ScriptedEngine(), metrics_prefix="vllm"))
    assert found[f"vllm:{name}", frozenset(labels)] == value


def test_recall_is_not_told_before_there_is_any() -> None:
    engine = ScriptedEngine(state=replace(READY, totals=ExpertStats()))
    assert not any(name.endswith("recall") for name, _ in samples(app_of(engine)))


def test_metrics_of_requests() -> None:
    engine = ScriptedEngine.saying("four")
    app = app_of(engine)
    request(app, "POST", CHAT, json=asking())
    request(app, "POST", CHAT, json=asking(max_tokens=2))
    request(app, "POST", CHAT, json=asking(stop="u"))
    engine.script = [*words("a"), GenerationFailed("lost")]
    request(app, "POST", CHAT, json=asking())
    request(app, "POST", CHAT, json=asking(temperature=9))
    request(app, "GET", "/no/such/place")
    found = samples(app)
    ended = {
        reason: found["odmoe:request_success_total", frozenset({MODEL, reason})]
        for reason in ("stop", "length", "abort", "error")
    }
    assert ended == {"stop": 2, "length": 1, "abort": 0, "error": 1}
    only = frozenset({MODEL})
    assert found["odmoe:time_to_first_token_seconds_count", only] == 4
    assert found["odmoe:inter_token_latency_seconds_count", only] == 3 + 1 + 2 + 0
    assert found["odmoe:e2e_request_latency_seconds_count", only] == 3
    assert found["http_requests_total", frozenset({CHAT, "POST", "200"})] == 3
    assert found["http_requests_total", frozenset({CHAT, "POST", "400"})] == 1
    assert found["http_requests_total", frozenset({"unknown", "GET", "404"})] == 1


KEYED = {"api_keys": ("first-key", "second-key")}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Bearer "},
        {"authorization": "first-key"},
        {"authorization": "Basic first-key"},
        {"authorization": "Bearer first-key-and-more"},
        {"x-api-key": "first"},
        {"authorization": "Bearer first-k\xe9y".encode("latin-1").decode("latin-1")},
    ],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", CHAT),
        ("GET", "/v1/models"),
        ("GET", "/metrics"),
        ("GET", "/version"),
        ("GET", "/openapi.json"),
        ("GET", "/no/such/place"),
        ("GET", "/health/"),
        ("GET", "//health"),
        ("GET", "/HEALTH"),
    ],
)
def test_without_the_key_nothing_is_told(method: str, path: str, headers: dict[str, str]) -> None:
    raw = {name: value.encode("latin-1") for name, value in headers.items()}
    answer = request(app_of(ScriptedEngine.saying("x"), **KEYED), method, path, headers=raw)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer first-key"},
        {"authorization": "bearer  second-key"},
        {"x-api-key": "second-key"},
    ],
)
def test_with_a_key(headers: dict[str, str]) -> None:
    answer = request(app_of(ScriptedEngine.saying("x"), **KEYED), "POST", CHAT, json=asking(), headers=headers)
    assert answer.status_code == 200


def test_health_needs_no_key() -> None:
    assert request(app_of(ScriptedEngine(), **KEYED), "GET", "/health").status_code == 200


def test_the_host_header_opens_nothing() -> None:
    headers = {"host": "example.org/health?x="}
    answer = request(app_of(ScriptedEngine(), **KEYED), "GET", "/metrics", headers=headers)
    assert answer.status_code == 401


def test_a_request_id_comes_back() -> None:
    answer = request(app_of(ScriptedEngine()), "GET", "/version", headers={"x-request-id": "my-id_1.2"})
    assert answer.headers["x-request-id"] == "my-id_1.2"


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, 'quo"te', "<script>"])
def test_a_bad_request_id_is_replaced(given: str) -> None:
    answer = request(app_of(ScriptedEngine()), "GET", "/version", headers={"x-request-id": given})
    assert re.fullmatch(r"req_[0-9a-f]{32}", answer.headers["x-request-id"])


@pytest.mark.parametrize("path", ["/no/such/place", CHAT])
def test_errors_have_a_request_id_too(path: str) -> None:
    assert request(app_of(ScriptedEngine()), "POST", path).headers["x-request-id"]


def test_the_access_log_has_the_ids_and_not_the_prompt(caplog: pytest.LogCaptureFixture) -> None:
    engine = ScriptedEngine.saying("hidden answer")
    with caplog.at_level(logging.DEBUG):
        body = request(
            app_of(engine), "POST", f"{CHAT}?token=hidden", json=asking("hidden"), headers={"x-request-id": "seen"}
        ).json()
    line = next(record.getMessage() for record in caplog.records if record.name == "odmoe_server.access")
    assert f"'{CHAT}' 200" in line
    assert "id=seen" in line
    assert body["id"] in line
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("odmoe")]
    assert not any("hidden" in message for message in ours)


def test_the_openapi_document_tells_of_the_request() -> None:
    document = request(app_of(ScriptedEngine()), "GET", "/openapi.json").json()
    operation = document["paths"][CHAT]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert set(schema["required"]) == {"model", "messages"}
    assert "temperature" in schema["properties"]
