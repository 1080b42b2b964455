"""The front end alone: what a streamed token costs the server's process beside the model. Knows HTTP by hand.

The OpenAI SDK takes longer to read a chunk than the server to write it, so that it would measure itself; this client
counts events and looks at nothing. The server tells of its processor time at /metrics.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from typing import Any, Final
from urllib.parse import urlsplit

import httpx
from prometheus_client.parser import text_string_to_metric_families

_READ_BYTES: Final = 1 << 16
_EVENT: Final = b"data: "
_DONE: Final = b"[DONE]"
_PROBE_S: Final = 5.0
_LIMIT_S: Final = 120.0


def measure(url: str, *, model: str, variant: str, streams: Sequence[int], tokens: int) -> list[dict[str, Any]]:
    """A row for each number of streams. `cpu_us_per_chunk` is the server's own; `chunks_per_core_s` its inverse."""
    asyncio.run(_all(url, model=model, streams=1, tokens=tokens))  # whatever happens once only
    return [
        {"variant": variant, "streams": number, **_row(url, model=model, streams=number, tokens=tokens)}
        for number in streams
    ]


def _row(url: str, *, model: str, streams: int, tokens: int) -> dict[str, Any]:
    before_s = _cpu_s(url)
    began_s = time.perf_counter()
    chunks = asyncio.run(_all(url, model=model, streams=streams, tokens=tokens))
    whole_s = time.perf_counter() - began_s
    cpu_s = _cpu_s(url) - before_s
    return {
        "output_tokens": streams * tokens,
        "output_tokens_per_s": streams * tokens / whole_s,
        "chunks": chunks,
        "cpu_us_per_chunk": 1e6 * cpu_s / chunks,
        "chunks_per_core_s": chunks / cpu_s,
    }


async def _all(url: str, *, model: str, streams: int, tokens: int) -> int:
    counts = await asyncio.wait_for(asyncio.gather(*(_one(url, model, tokens) for _ in range(streams))), _LIMIT_S)
    return sum(counts)


async def _one(url: str, model: str, tokens: int) -> int:
    """Ask for one stream, and count its events."""
    place = urlsplit(url)
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    try:
        writer.write(_request(place.netloc, model, tokens))
        await writer.drain()
        count, tail = 0, b""
        while piece := await reader.read(_READ_BYTES):
            # An event cut in two is counted with its second part.
            joined = tail + piece
            count += joined.count(_EVENT)
            tail = b"" if joined.endswith(b"\n") else joined[-len(_EVENT) + 1 :]
            if _DONE in joined:
                return count - 1
        raise ValueError("the server broke the stream off")
    finally:
        writer.close()


def _request(host: str, model: str, tokens: int) -> bytes:
    content = [{"role": "user", "content": "Go on."}]
    body = json.dumps({"model": model, "messages": content, "stream": True, "max_tokens": tokens}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def _cpu_s(url: str) -> float:
    """Seconds the server's process has computed so far."""
    page = httpx.get(f"{url}/metrics", timeout=_PROBE_S, trust_env=False).text
    for family in text_string_to_metric_families(page):
        if family.name == "process_cpu_seconds":
            return float(next(sample.value for sample in family.samples if sample.name.endswith("_total")))
    raise ValueError("/metrics does not tell the process's time")
