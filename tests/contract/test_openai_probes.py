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
        "nodes": [
            {"id": "node-0", "role": "node", "alive": True, "slots": 4, "used_slots": 1},
            {"id": "predictor", "role": "predictor", "alive": True, "slots": 0, "used_slots": 0},
        ],
    }


@pytest.mark.parametrize("state", ["loading", "waiting", "stopping", "dead"])
def test_health_when_not_ready(state: str) -> None:
    engine = ScriptedEngine()
    engine.unready(state, "in words")
    answer = request(app_of(engine), "GET", "/health")
    assert answer.status_code == 503
    assert answer.headers["retry-after"]
    assert (answer.json()["state"], answer.json()["detail"]) == (state, "in words")


@pytest.mark.parametrize("path", ["/health", "/health/ready", "/health/live", "/metrics"])
def test_probes_may_ask_for_the_head_alone(path: str) -> None:
    assert request(app_of(ScriptedEngine()), "HEAD", path).status_code == 200


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
        ("kv_cache_usage_perc", {MODEL}, 0.25),
        ("kv_cache_bytes", {"running"}, 300),
        ("kv_cache_bytes", {"prefix"}, 100),
        ("kv_cache_bytes", {"budget"}, 1600),
        ("engine_state", {"ready"}, 1),
        ("engine_state", {"loading"}, 0),
        ("expert_activations_total", {MODEL}, 10),
        ("expert_activations_predicted_total", {MODEL}, 8),
        ("expert_activations_predicted_late_total", {MODEL}, 1),
        ("expert_predictions_total", {"0", "hit"}, 5),
        ("expert_predictions_total", {"1", "late"}, 1),
        ("expert_predictions_total", {"1", "miss"}, 1),
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
        ("expert_load_seconds_sum", {"node-0"}, 0.5),
        ("expert_load_seconds_count", {"node-0"}, 7),
        ("expert_load_seconds_bucket", {"node-0", "0.1"}, 4),
        ("expert_load_seconds_bucket", {"node-0", "1.0"}, 6),
        ("expert_load_seconds_bucket", {"node-0", "+Inf"}, 7),
        ("rpc_seconds_sum", {"node-0"}, 0.4),
        ("rpc_seconds_count", {"node-0"}, 8),
        ("expert_compute_seconds_total", {"node-0"}, 0.25),
        ("expert_stall_seconds_total", {MODEL}, 0.0625),
        ("expert_substitutions_total", {"1"}, 3),
        ("spec_decode_num_draft_tokens_total", {MODEL}, 6),
        ("spec_decode_num_accepted_tokens_total", {MODEL}, 4),
        ("expert_loads_failed_total", {"node-0"}, 11),
        ("expert_loads_cancelled_total", {"node-0"}, 12),
        ("expert_loads_broken_off_total", {"node-0"}, 13),
        ("expert_broken_off_seconds_total", {"node-0"}, 0.75),
        ("expert_evictions_total", {"node-0"}, 14),
        ("node_late_forecasts_total", {"node-0"}, 15),
        ("node_stale_messages_total", {"node-0"}, 16),
        ("node_duplicate_computes_total", {"node-0"}, 17),
        ("node_expired_computes_total", {"node-0"}, 18),
        ("node_overflows_total", {"node-0"}, 19),
        ("node_undelivered_total", {"node-0"}, 20),
        ("node_loop_errors_total", {"node-0"}, 21),
        ("node_protocol_errors_total", {"node-0"}, 22),
        ("node_bad_messages_total", {"node-0"}, 23),
        ("node_up", {"predictor"}, 1),
        ("predictor_undelivered_total", {"predictor"}, 31),
        ("predictor_loop_errors_total", {"predictor"}, 32),
        ("predictor_protocol_errors_total", {"predictor"}, 33),
        ("predictor_bad_messages_total", {"predictor"}, 34),
        ("predictor_forecasts_total", {"predictor"}, 35),
        ("predictor_rebirths_total", {"predictor"}, 36),
        ("cluster_epoch", {MODEL}, 41),
        ("node_rejoins_total", {MODEL}, 42),
        ("stale_forecasts_total", {MODEL}, 43),
        ("duplicate_answers_total", {MODEL}, 44),
        ("shadow_realign_total", {MODEL}, 45),
        ("loop_errors_total", {MODEL}, 46),
        ("shadow_lead_layers", {MODEL}, 47),
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
    assert found["odmoe:request_generation_tokens_count", only] == 3
    assert found["odmoe:request_generation_tokens_sum", only] == 5 + 2 + 3
    prompts = [len(asked.prompt_ids) for asked in engine.requests]
    assert found["odmoe:request_prompt_tokens_sum", only] == sum(prompts[:3])


def test_metrics_of_what_only_the_engine_knows() -> None:
    """The answer that a stop string ended is not among them: the engine was not asked to its end."""
    engine = ScriptedEngine.saying("four")
    app = app_of(engine)
    request(app, "POST", CHAT, json=asking())
    request(app, "POST", CHAT, json=asking(max_tokens=2))
    request(app, "POST", CHAT, json=asking(stop="u"))
    found = samples(app)
    only = frozenset({MODEL})
    for name, each in (("queue", 0.25), ("prefill", 0.5), ("decode", 2.0)):
        assert found[f"odmoe:request_{name}_time_seconds_count", only] == 2
        assert found[f"odmoe:request_{name}_time_seconds_sum", only] == 2 * each
    assert found["odmoe:prefix_cache_hits_total", only] == 2 * 3
    assert found["odmoe:prefix_cache_queries_total", only] == sum(len(r.prompt_ids) for r in engine.requests[:2])


def test_metrics_of_http() -> None:
    app = app_of(ScriptedEngine.saying("four"))
    request(app, "POST", CHAT, json=asking())
    request(app, "POST", CHAT, json=asking())
    request(app, "POST", CHAT, json=asking(stop="u"))
    request(app, "POST", CHAT, json=asking(temperature=9))
    request(app, "GET", "/no/such/place")
    found = samples(app)
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
        ("GET", "/health//"),
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


def test_load_and_stats_and_the_cluster() -> None:
    app = app_of(ScriptedEngine())
    assert request(app, "GET", "/load").json() == {"server_load": 3, "running": 1, "queued": 2}
    stats = request(app, "GET", "/v1/stats").json()
    assert (stats["experts"]["hit_rate"], stats["experts"]["prediction_recall"]) == (0.7, 0.9)
    assert stats["nodes"][0]["load_bytes_total"] == 7000
    cluster = request(app, "GET", "/cluster").json()
    assert (cluster["model"], cluster["model_fingerprint"]) == (MODEL, "odmoe_0123456789ab")
    assert [node["id"] for node in cluster["nodes"]] == ["node-0", "predictor"]


def test_stats_before_anything_happened() -> None:
    engine = ScriptedEngine(state=replace(READY, totals=ExpertStats()))
    experts = request(app_of(engine), "GET", "/v1/stats").json()["experts"]
    assert (experts["hit_rate"], experts["prediction_recall"]) == (None, None)


@pytest.mark.parametrize(
    ("state", "live", "ready"), [("ready", 200, 200), ("loading", 200, 503), ("waiting", 200, 503), ("dead", 503, 503)]
)
def test_liveness_is_not_readiness(state: str, live: int, ready: int) -> None:
    engine = ScriptedEngine()
    engine.unready(state, "in words")
    app = app_of(engine, **KEYED)
    assert request(app, "GET", "/health/live").status_code == live
    assert request(app, "GET", "/health/ready").status_code == ready


@pytest.mark.parametrize(
    "path", ["/chat/completions", "/completions", "/tokenize", "/detokenize", "/load", "/v1/stats", "/cluster", "/ping"]
)
def test_every_other_route_needs_the_key(path: str) -> None:
    assert request(app_of(ScriptedEngine(), **KEYED), "POST", path).status_code == 401


def test_whose_request_it_is_reaches_the_engine_without_the_key() -> None:
    engine = ScriptedEngine.saying("x")
    for key in KEYED["api_keys"]:
        request(app_of(engine, **KEYED), "POST", CHAT, json=asking(), headers={"x-api-key": key})
    request(app_of(engine), "POST", CHAT, json=asking())
    assert [asked.tenant for asked in engine.requests] == ["key-0", "key-1", ""]


@pytest.mark.parametrize("path", ["/models", f"/models/{ALIAS}"])
def test_the_paths_of_llama_cpp(path: str) -> None:
    app = app_of(ScriptedEngine.saying("x"))
    assert request(app, "GET", path).json() == request(app, "GET", f"/v1{path}").json()
    assert request(app, "POST", "/chat/completions", json=asking()).status_code == 200


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("expert_predictions_total", {"layer", "outcome"}),
        ("expert_prediction_recall", {"model_name"}),
        ("expert_load_seconds_bucket", {"node", "le"}),
        ("expert_load_bytes_total", {"node"}),
        ("expert_wait_seconds_total", {"model_name"}),
        ("expert_slots", {"node", "state"}),
        ("expert_evictions_total", {"node"}),
        ("expert_substitutions_total", {"layer"}),
        ("node_up", {"node", "role"}),
        ("node_rejoins_total", {"model_name"}),
        ("rpc_seconds_bucket", {"node", "le"}),
        ("shadow_lead_layers", {"model_name"}),
        ("shadow_realign_total", {"model_name"}),
    ],
)
def test_every_metric_of_the_experts_is_there_with_its_labels(name: str, labels: set[str]) -> None:
    page = request(app_of(ScriptedEngine()), "GET", "/metrics").text
    samples = [
        sample
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == f"odmoe:{name}"
    ]
    assert samples
    assert {frozenset(sample.labels) for sample in samples} == {frozenset(labels)}
