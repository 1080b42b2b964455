"""What `Telling` tells as spans of OpenTelemetry, and the span of each HTTP request around them.

Knows the SDK, ASGI and W3C's traceparent; imported only where traces are wanted. Spans of answers, steps, layers and
nodes are made on the recorder's thread, from stamps, so nobody who computes waits for them. The server's monotonic
clock is brought to the wall's once, at start. No span has a token or a text.
"""

import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any, Final

from opentelemetry import context as otel_context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from odmoe_server.cluster.timeline import Came, Left, Mark
from odmoe_server.guard import PAGE_PATH, PROBE_PATHS, REQUEST_ID_HEADER
from odmoe_server.tracing.telling import LayerWork, NodeWork, StepWork, Telling

SERVER_ERROR: Final = 500
_W3C: Final = TraceContextTextMapPropagator()


def exporter_to(url: str | None) -> SpanExporter:
    """OTLP over HTTP; without an address, where OpenTelemetry's own variables say."""
    return OTLPSpanExporter(endpoint=url)


class Tracing:
    """The traces of one server: `around` makes those of requests, `write` (of a recorder's sink) what is beneath."""

    def __init__(self, exporter: SpanExporter, *, clock: Callable[[], float] = time.monotonic) -> None:
        own = Resource({"service.name": "odmoe", "service.version": version("odmoe")})
        self._provider = TracerProvider(resource=own.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("odmoe", version("odmoe"))
        self._began_ns = time.time_ns() - round(clock() * 1e9)
        self._telling = Telling()
        self._answers: dict[int, Span] = {}

    def around(self, app: ASGIApp) -> ASGIApp:
        """The application, with a span for each request that is no probe; its parent is the client's, if it names
        one."""

        async def traced(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http" or scope["path"] in PROBE_PATHS | {PAGE_PATH}:
                await app(scope, receive, send)
                return
            parent = _W3C.extract(dict(Headers(scope=scope)), context=otel_context.Context())
            kind, method = SpanKind.SERVER, scope["method"]
            with self._tracer.start_as_current_span(
                method, context=parent, kind=kind, attributes={"http.request.method": method}, record_exception=False
            ) as span:
                await app(scope, receive, _telling_status(send, span))
                route = getattr(scope.get("route"), "path", "unknown")
                span.update_name(f"{method} {route}")
                span.set_attribute("http.route", route)

        return traced

    def write(self, items: Sequence[Mark], dropped: int) -> None:
        """Take marks; see `recording.Sink`."""
        for mark in items:
            if isinstance(mark, Came):
                self._came(mark)
            elif isinstance(mark, Left):
                self._left(mark)
            elif (step := self._telling.heard(mark)) is not None:
                self._stepped(step)

    def close(self) -> None:
        """Send what is left."""
        for span in self._answers.values():
            span.end()
        self._provider.shutdown()

    def _came(self, mark: Came) -> None:
        self._answers[mark.sequence] = self._tracer.start_span(
            "answer",
            context=mark.context.run(otel_context.get_current),
            start_time=self._ns(mark.at_s),
            attributes={"odmoe.request_id": mark.request_id, "gen_ai.usage.input_tokens": mark.num_prompt},
        )

    def _left(self, mark: Left) -> None:
        span = self._answers.pop(mark.sequence, None)
        if span is None:
            return
        span.set_attribute("gen_ai.usage.output_tokens", mark.num_tokens)
        span.set_attribute("gen_ai.response.finish_reasons", [mark.reason or "broken off"])
        span.end(self._ns(mark.at_s))

    def _stepped(self, step: StepWork) -> None:
        """Each sequence has its own span of the step; layers, which all share, are under the first one that is
        recorded, and the others point there."""
        home: Span | None = None
        for sequence, (position, num_tokens) in step.sequences.items():
            answer = self._answers.get(sequence)
            if answer is None or not answer.is_recording():
                continue
            facts = {
                "odmoe.position": position,
                "odmoe.tokens": num_tokens,
                "odmoe.sequences_in_step": len(step.sequences),
            }
            links = [] if home is None else [Link(home.get_span_context())]
            name = "step: prompt" if step.is_prompt else "step"
            span = self._child(answer, name, step.began_s, facts, links=links)
            if home is None:
                home = span
                for layer in step.layers:
                    self._layer(home, layer)
            span.end(self._ns(step.ended_s))

    def _layer(self, step: Span, work: LayerWork) -> None:
        facts = {
            "odmoe.layer": work.layer,
            "odmoe.experts": work.experts,
            "odmoe.forecast": sorted(work.predicted),
            **{f"odmoe.experts_{outcome}": count for outcome, count in work.outcomes.items()},
        }
        span = self._child(step, f"layer {work.layer}", work.began_s, facts)
        for node in work.nodes:
            self._node(span, node)
        span.end(self._ns(work.ended_s))

    def _node(self, layer: Span, work: NodeWork) -> None:
        facts = {
            "odmoe.node": work.node_id,
            "odmoe.experts": work.experts,
            "odmoe.outcomes": [timing.outcome for timing in work.timings],
            "odmoe.wait_s": max((timing.wait_s for timing in work.timings), default=0.0),
            "odmoe.compute_s": sum(timing.compute_s for timing in work.timings),
        }
        span = self._child(layer, f"node {work.node_id}", work.began_s, facts, kind=SpanKind.CLIENT)
        if work.failed is not None:
            span.set_status(Status(StatusCode.ERROR, work.failed))
        span.end(self._ns(work.ended_s))

    def _child(
        self,
        parent: Span,
        name: str,
        began_s: float,
        facts: dict[str, Any],
        *,
        links: Sequence[Link] = (),
        kind: SpanKind = SpanKind.INTERNAL,
    ) -> Span:
        context = set_span_in_context(parent, otel_context.Context())
        began_ns = self._ns(began_s)
        return self._tracer.start_span(
            name, context=context, kind=kind, attributes=facts, links=links, start_time=began_ns
        )

    def _ns(self, at_s: float) -> int:
        return self._began_ns + round(at_s * 1e9)


def _telling_status(send: Send, span: Span) -> Send:
    async def told(message: Message) -> None:
        if message["type"] == "http.response.start":
            span.set_attribute("http.response.status_code", message["status"])
            if request_id := Headers(raw=message["headers"]).get(REQUEST_ID_HEADER):
                span.set_attribute("odmoe.request_id", request_id)
            if message["status"] >= SERVER_ERROR:
                span.set_status(StatusCode.ERROR)
        await send(message)

    return told
