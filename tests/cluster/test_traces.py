"""Traces of a cluster on real sockets: each request's answer, steps, layers and nodes, one beneath the other, and no
text anywhere; and what reaches a collector."""

import asyncio
import http.server
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.types import ASGIApp

from odmoe_model.skeleton import load_tokenizer
from odmoe_model.store import ExpertStore
from odmoe_server.app import create_app
from odmoe_server.catalog import Catalog
from odmoe_server.engine.build import EngineOptions
from odmoe_server.engine_api import Sampling
from odmoe_server.text import TextCodec
from odmoe_server.tracing.option import open_tracing
from odmoe_server.tracing.spans import Tracing
from support.cluster import LocalCluster, local_cluster
from support.http_app import CHAT, app_of, asking
from support.scripted_engine import ScriptedEngine
from support.serve_process import chat_store

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT_ID = "b7ad6b7169203331"
NUM_TOKENS = 6
SECRET = "marzipan"


class Traced:
    """What was exported for one request that named a parent and two answered beside one another."""

    def __init__(self, directory: Path) -> None:
        self.exporter = InMemorySpanExporter()
        self.tracing = Tracing(self.exporter)
        store = ExpertStore.open(chat_store(directory), verify=False)
        options = EngineOptions(endpoint=f"ipc://{directory}/server", spans=self.tracing)
        with local_cluster(store, directory, predictor=False, options=options) as cluster:
            self.statuses = asyncio.run(self._ask(self.tracing.around(app_around(cluster))))
        self.num_layers = store.manifest.num_moe_layers
        self.spans: Sequence[ReadableSpan] = self.exporter.get_finished_spans()

    async def _ask(self, app: ASGIApp) -> list[int]:
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": f"Say {SECRET}"}],
            "max_tokens": NUM_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
        }
        parent = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01", "x-request-id": "mine"}
        unsampled = {"traceparent": "00-1af7651916cd43dd8448eb211c80319d-b7ad6b7169203332-00"}
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", timeout=60) as http:
            alone = await http.post(CHAT, json=body, headers=parent)
            together = await http.post(CHAT, json={**body, "n": 2, "stream": True})
            unseen = await http.post(CHAT, json=body, headers=unsampled)
            probe = await http.get("/health")
        return [answer.status_code for answer in (alone, together, unseen, probe)]

    def in_trace(self, trace_id: int, name: str) -> list[ReadableSpan]:
        return [span for span in self.spans if span.context.trace_id == trace_id and span.name.startswith(name)]

    def beneath(self, parent: ReadableSpan, name: str) -> list[ReadableSpan]:
        own = [span for span in self.spans if span.parent and span.parent.span_id == parent.context.span_id]
        return [span for span in own if span.name.startswith(name)]


def app_around(cluster: LocalCluster) -> ASGIApp:
    catalog = Catalog(
        names=("tiny",),
        created=1_700_000_000,
        context_length=cluster.engine.context_length,
        fingerprint="odmoe_0123456789ab",
        sampling=Sampling(),
    )
    return create_app(engine=cluster.engine, text=TextCodec(load_tokenizer(cluster.store)), catalog=catalog)


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Traced:
    return Traced(tmp_path_factory.mktemp("traces"))


def test_a_request_continues_the_clients_trace(traced: Traced) -> None:
    assert traced.statuses == [200, 200, 200, 200]
    (root,) = traced.in_trace(int(TRACE_ID, 16), "POST")
    assert root.name == f"POST {CHAT}"
    assert root.parent is not None
    assert root.parent.span_id == int(PARENT_ID, 16)
    assert attributes(root) >= {"http.response.status_code": 200, "odmoe.request_id": "mine"}.items()


def test_request_answer_steps_layers_and_nodes_lie_one_beneath_the_other(traced: Traced) -> None:
    (root,) = traced.in_trace(int(TRACE_ID, 16), "POST")
    (answer,) = traced.beneath(root, "answer")
    assert attributes(answer) >= {"gen_ai.usage.output_tokens": NUM_TOKENS}.items()
    steps = traced.beneath(answer, "step")
    assert [step.name for step in steps] == ["step: prompt"] + (NUM_TOKENS - 1) * ["step"]
    for step in steps:
        assert step.start_time >= answer.start_time
        assert step.end_time <= answer.end_time
        layers = traced.beneath(step, "layer")
        assert [layer.name for layer in layers] == [f"layer {number}" for number in range(traced.num_layers)]
        for layer in layers:
            assert step.start_time <= layer.start_time <= layer.end_time <= step.end_time
            nodes = traced.beneath(layer, "node")
            told = sorted(expert for node in nodes for expert in values(node, "odmoe.experts"))
            assert told == list(values(layer, "odmoe.experts")), "each expert was computed on one node"
            assert all(layer.start_time <= node.start_time <= node.end_time <= layer.end_time for node in nodes)


def test_answers_side_by_side_share_their_layers(traced: Traced) -> None:
    (root,) = [span for span in traced.spans if span.name.startswith("POST") and span.parent is None]
    answers = traced.beneath(root, "answer")
    assert len(answers) == 2
    of_each = [traced.beneath(answer, "step") for answer in answers]
    shared = [step for steps in of_each for step in steps if attributes(step) >= {"odmoe.sequences_in_step": 2}.items()]
    homes = {step.context.span_id for step in shared if traced.beneath(step, "layer")}
    pointing = {link.context.span_id for step in shared for link in step.links}
    assert homes, "they were decoded together"
    assert homes == pointing
    assert len(shared) == 2 * len(homes)


def test_no_text_and_no_unsampled_trace_is_exported(traced: Traced) -> None:
    assert not [span for span in traced.spans if SECRET in span.to_json()]
    assert not traced.in_trace(0x1AF7651916CD43DD8448EB211C80319D, "")
    assert not [span for span in traced.spans if "health" in span.name]


def attributes(span: ReadableSpan) -> Any:
    return dict(span.attributes or {}).items()


def values(span: ReadableSpan, name: str) -> Sequence[int]:
    found: Any = dict(span.attributes or {})[name]
    return list(found)


@contextmanager
def collector() -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """An address that takes what it is sent."""
    got: list[tuple[str, bytes]] = []

    class Taking(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Taking) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", got
        finally:
            server.shutdown()
            thread.join(10)


@pytest.mark.parametrize("by_option", [True, False])
def test_a_collector_gets_them_by_otlp(by_option: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "ours")
    with collector() as (url, got):
        if not by_option:
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        environ = {} if by_option else {"OTEL_EXPORTER_OTLP_ENDPOINT": url}
        tracing = open_tracing(url if by_option else None, environ=environ)
        assert tracing is not None
        asyncio.run(ask_once(tracing.around(app_of(ScriptedEngine()))))
        tracing.close()
    assert {path for path, _ in got} == {"/v1/traces"}
    (resource,) = ExportTraceServiceRequest.FromString(got[0][1]).resource_spans
    assert "ours" in [attribute.value.string_value for attribute in resource.resource.attributes]
    assert [span.name for span in resource.scope_spans[0].spans] == [f"POST {CHAT}"]


async def ask_once(app: ASGIApp) -> None:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        answer = await http.post(CHAT, json=asking())
    assert answer.status_code == 200
