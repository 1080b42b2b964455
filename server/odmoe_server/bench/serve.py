"""`odmoe bench serve`: many users at once, over HTTP: odmoe, plain transformers behind the same API, and the API alone.

Knows which servers are measured under which load; processes, clients and figures are their modules' own.
"""

import asyncio
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import httpx
import msgspec
from rich.console import Console

from odmoe_model.skeleton import load_tokenizer
from odmoe_model.store import ExpertStore
from odmoe_server import listening
from odmoe_server.bench import cluster, pinning, serve_front, serve_load, serve_process, serve_record
from odmoe_server.bench.prompts import Prompts
from odmoe_server.bench.serve_load import Asked
from odmoe_server.bench.serve_question import BATCHED, FRONT, NAME, ODMOE, Question
from odmoe_server.children import ChildSpec, Supervisor, spawn_with
from odmoe_server.launch import probe
from odmoe_server.launch_plan import environment

_MAX_BATCH: Final = 16
_MOST_DISTURBED: Final = 8
_SETTLE_S: Final = 0.7
_PROBE_S: Final = 5.0


def measure(question: Question, *, console: Console) -> list[dict[str, Any]]:
    """A row for each variant and number of streams. Raises BenchError or NoSdkError."""
    store = ExpertStore.open(question.store, verify=False)
    prompts = Prompts(load_tokenizer(store))
    del store
    cores = pinning.choose(pinning.available())
    rows: list[dict[str, Any]] = []
    for variant in question.variants:
        console.print(f"{variant} ...", highlight=False)
        if variant == FRONT:
            for paced in (True, False):
                with _compared(question, cores, engine="instant", paced=paced) as url:
                    rows += serve_front.measure(
                        url, model=NAME, variant=_front_name(paced=paced), streams=(1, 16), tokens=question.front_tokens
                    )
            continue
        with _server(variant, question, cores, console) as (url, model):
            for row in _Measuring(question, prompts, url, model).rows(variant):
                console.print(_line(row), highlight=False)
                rows.append(row)
    return [dict.fromkeys(serve_record.FIELDS) | row for row in rows]


def _front_name(*, paced: bool) -> str:
    return f"{FRONT}, {'a token a write' if paced else 'tokens at once'}"


def _line(row: dict[str, Any]) -> str:
    speed = f"{row['output_tokens_per_s']:.1f} tokens/s, " if row["output_tokens_per_s"] else ""
    return f"  {row['streams']} streams: {speed}{row['itl_ms_p50'] or 0:.0f} ms between tokens"


@contextmanager
def _server(
    variant: str, question: Question, cores: pinning.Cores, console: Console
) -> Iterator[tuple[str, str | None]]:
    """Address of a server that answers, and its model's name if it has one of ours."""
    if variant == ODMOE and question.url is not None:
        yield question.url.rstrip("/").removesuffix("/v1"), None
    elif variant == ODMOE:
        with cluster.running(question.settings, store=question.store, cores=cores, tell=_quietly) as roles:
            yield str(roles.client.base_url).rstrip("/"), NAME
    else:
        batch = _MAX_BATCH if variant == BATCHED else 1
        with _compared(question, cores, engine="resident", max_batch=batch) as url:
            yield url, NAME


def _quietly(missing: str) -> None:
    """What is missing while a cluster comes up is of no interest unless it stays so; then it is raised."""


class _Measuring:
    """One server under each load in turn."""

    def __init__(self, question: Question, prompts: Prompts, url: str, model: str | None) -> None:
        self._question, self._prompts, self._url = question, prompts, url
        self._num_asked = 0
        with httpx.Client(base_url=url, timeout=_PROBE_S, trust_env=False) as client:
            self._model = model or str(client.get("/v1/models").json()["data"][0]["id"])

    def rows(self, variant: str) -> Iterator[dict[str, Any]]:
        self._run(lambda sdk: serve_load.steady(sdk, self._load(1), model=self._model))  # whatever happens once only
        for streams in self._question.streams:
            yield {"variant": variant, "streams": streams, **self._steady(streams)}
        if self._question.long_prompt_tokens:
            streams = max((s for s in self._question.streams if s <= _MOST_DISTURBED), default=1)
            yield {"variant": f"{variant}, long prompt", "streams": streams, **self._disturbed(streams)}

    def _steady(self, streams: int) -> dict[str, Any]:
        loads = self._loads()
        told = self._run(lambda sdk: serve_load.steady(sdk, self._load(streams), model=self._model))
        row = serve_load.summary(told)
        if loads is not None:
            row["loads_per_token"] = ((self._loads() or 0) - loads) / row["output_tokens"]
        return row

    def _disturbed(self, streams: int) -> dict[str, Any]:
        """Between tokens: while a long prompt was prefilled; `undisturbed` is before it came."""
        question = self._question
        running = [requests[0] for requests in self._load(streams, tokens=3 * question.tokens)]
        joining = self._ask(question.long_prompt_tokens, number=0, tokens=1)
        found = self._run(lambda sdk: serve_load.disturbed(sdk, running, joining, model=self._model))
        return {
            "prompt_tokens": found.joined.prompt_tokens,
            **serve_load.percentiles("ttft_ms", [found.joined.first_s]),
            **serve_load.percentiles("itl_ms", found.during_s),
            "undisturbed_itl_ms_p50": serve_load.percentiles("itl_ms", found.before_s)["itl_ms_p50"],
            "output_tokens_per_s": None,  # they run for different times
        }

    def _load(self, streams: int, *, tokens: int | None = None) -> list[list[Asked]]:
        """Prompts that were not asked before, lest a cache of their heads be measured."""
        lengths = self._question.prompt_tokens
        found: list[list[Asked]] = []
        for _ in range(streams):
            found.append([])
            for _ in range(self._question.repeats):
                self._num_asked += 1
                length = lengths[self._num_asked % len(lengths)]
                found[-1].append(self._ask(length, number=self._num_asked, tokens=tokens))
        return found

    def _ask(self, length: int, *, number: int, tokens: int | None) -> Asked:
        prompt = self._prompts.make(length, number=number)
        return Asked(content=prompt.content, tokens=tokens or self._question.tokens)

    def _run(self, work: Callable[[Any], Any]) -> Any:
        async def run() -> Any:
            async with serve_load.client(self._url) as sdk:
                return await work(sdk)

        return asyncio.run(run())

    def _loads(self) -> int | None:
        """Experts all nodes have loaded; None of a server that has none."""
        with httpx.Client(base_url=self._url, timeout=_PROBE_S, trust_env=False) as client:
            _settle()
            nodes = client.get("/v1/stats").json()["nodes"]
        return sum(node["loads_total"] for node in nodes) if nodes else None


def _settle() -> None:
    """Nodes tell what they loaded with their heartbeats."""
    asyncio.run(asyncio.sleep(_SETTLE_S))


@contextmanager
def _compared(question: Question, cores: pinning.Cores, **job: Any) -> Iterator[str]:
    """Address of a server with another engine, which has loaded its weights. Raises BenchError."""
    said: list[str] = []
    with listening.bind("127.0.0.1", 0) as listener:
        work = serve_process.Job(store=str(question.store), name=NAME, listen_fd=listener.fileno(), **job)
        command = [sys.executable, "-m", serve_process.__name__, msgspec.json.encode(work).decode()]
        spec = ChildSpec(
            name="compared",
            command=pinning.pinned(command, cores.main),
            environment=environment(1),
            pass_fds=(listener.fileno(),),
        )
        supervisor = Supervisor(specs=[spec], spawn=spawn_with(lambda _, line: said.append(line)))
        try:
            _await_health(supervisor, listening.url(listener), said)
            yield listening.url(listener)
        finally:
            supervisor.stop(hurry=lambda: False)


def _await_health(supervisor: Supervisor, url: str, said: list[str]) -> None:
    async def wait() -> None:
        loop = asyncio.get_running_loop()
        with httpx.Client(base_url=url, timeout=_PROBE_S, trust_env=False) as client:
            while True:
                supervisor.tick(loop.time())
                if any(child.failures for child in supervisor.children):
                    raise cluster.BenchError("a server to compare with ended: " + "\n  ".join(said[-20:]))
                if probe(client) is not None:
                    return
                await asyncio.sleep(0.2)

    try:
        asyncio.run(asyncio.wait_for(wait(), cluster.START_S))
    except TimeoutError as error:
        raise cluster.BenchError("a server to compare with did not come up") from error
