"""Two hundred clients of the real engine that go away half-way: it answers at once, and nothing of theirs is left.

Real routes and sockets, real nodes and predictor, a tiny model.
"""

import asyncio
import time
from pathlib import Path
from typing import Any

import httpx
import torch

from odmoe_model.store import ExpertStore
from odmoe_server.engine.build import EngineOptions
from odmoe_server.limits import ServiceLimits
from support.abandoning import aborted_total, ask_and_leave, crowd
from support.cluster import LocalCluster, local_cluster
from support.http_app import MODEL, app_of, asking
from support.http_served import running_app, until
from support.scripted_engine import tiny_tokenizer
from support.stores import tiny_store

NUM_CLIENTS = 200
AT_ONCE_S = 1.0
ENDLESS = 400
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", asking(max_tokens=ENDLESS, n=2)),
    ("/v1/completions", {"model": MODEL, "prompt": ["a" * 40, "b"], "max_tokens": ENDLESS}),
    ("/v1/responses", {"model": MODEL, "input": "x", "max_output_tokens": ENDLESS}),
    ("/v1/messages", {"model": MODEL, "max_tokens": ENDLESS, "messages": [{"role": "user", "content": "x"}]}),
]


async def abandon(url: str, number: int) -> None:
    """Ask, wait for the first of the answer or, where it comes whole, a little, and hang up."""
    path, body = REQUESTS[number % len(REQUESTS)]
    stream = number // len(REQUESTS) % 2 == 0

    async def wait(reader: asyncio.StreamReader) -> None:
        if stream:
            await reader.readuntil(b"data: ")
        else:
            await asyncio.sleep(0.05 * (number % 7))

    await ask_and_leave(url, path, {**body, "stream": stream}, wait=wait, by_reset=number % 3 == 0)


def is_left(cluster: LocalCluster) -> bool:
    """Whether anything of a request is, on any role."""
    health, dispatch = cluster.engine.health(), cluster.engine._cluster.state.dispatch
    if health.running or health.queued or health.kv_reserved_bytes:
        return True
    if dispatch.calls or dispatch.requests or dispatch.forecasts:
        return True
    agents = [node.agent for node in cluster.nodes.values()]
    return any(
        agent.report().used_slots or agent.state.num_requests or agent.state.num_wants or agent.report().accounted_bytes
        for agent in agents
    )


def test_nothing_is_left_of_two_hundred_clients_that_went_away(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    store = ExpertStore.open(tiny_store("qwen3_moe", tmp_path, vocab_size=len(tiny_tokenizer())), verify=False)
    options = EngineOptions(endpoint=f"ipc://{tmp_path}/server", max_queued=2 * NUM_CLIENTS, prefix_cache=False)
    limits = ServiceLimits(max_queued=2 * NUM_CLIENTS)
    with (
        local_cluster(store, tmp_path, slots=4, options=options) as cluster,
        running_app(app_of(cluster.engine, limits=limits)) as server,  # type: ignore[arg-type]
    ):
        crowd(lambda number: abandon(server.url, number), number=NUM_CLIENTS)
        begun_s = time.monotonic()
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=asking(max_tokens=3), timeout=AT_ONCE_S)
        assert answer.json()["usage"]["completion_tokens"] == 3
        assert time.monotonic() - begun_s < AT_ONCE_S
        until(lambda: not is_left(cluster))
        said = cluster.engine.health().generation_tokens_total
        page = httpx.get(f"{server.url}/metrics", timeout=AT_ONCE_S).text
        for node in cluster.nodes.values():
            node.agent.state.check_integrity()
        assert cluster.engine.health().generation_tokens_total == said < NUM_CLIENTS * ENDLESS / 4
        assert cluster.engine.health().failures_total == 0
    assert aborted_total(page) >= NUM_CLIENTS / 2
