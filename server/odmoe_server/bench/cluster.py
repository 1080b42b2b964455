"""All roles of one variant as the processes `odmoe serve` starts, pinned, asked over HTTP, and ended whatever happens.

Knows processes and the API; not what is compared with what.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import httpx

from odmoe_model.manifest import read_manifest
from odmoe_server import listening
from odmoe_server.bench.pinning import Cores, pinned
from odmoe_server.bench.reading import Reading, read
from odmoe_server.children import ChildSpec, Supervisor, spawn_with
from odmoe_server.config import ServeSettings
from odmoe_server.launch import obstacle, probe, runtime_directory
from odmoe_server.launch_plan import Plan, children

START_S: Final = 600.0
ANSWER_S: Final = 600.0
# Nodes tell what they loaded with their heartbeats, each a quarter of a second.
_SETTLE_S: Final = 0.7
_PROBE_S: Final = 5.0
_TICK_S: Final = 0.2
_NUM_LAST_WORDS: Final = 20
_NAME: Final = "bench"


class BenchError(ValueError):
    """Something could not be measured; the message says what happened."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the server said, and how many tokens that were."""

    text: str
    prompt_tokens: int
    completion_tokens: int


@dataclass(kw_only=True)
class Running:
    """Roles that are up."""

    client: httpx.Client
    supervisor: Supervisor
    said: dict[str, list[str]]

    def ask(self, content: str, *, tokens: int) -> Answer:
        """The greedy answer of so many tokens to one message. Raises BenchError."""
        body = {
            "model": _NAME,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": tokens,
            "ignore_eos": True,
        }
        try:
            response = self.client.post("/v1/chat/completions", json=body, timeout=ANSWER_S)
        except httpx.HTTPError as error:
            raise BenchError(f"the server did not answer: {error!r}{self._last_words()}") from error
        if response.status_code != httpx.codes.OK:
            raise BenchError(f"the server refused: {response.text}{self._last_words()}")
        answer = response.json()
        usage = answer["usage"]
        return Answer(
            text=answer["choices"][0]["message"]["content"],
            prompt_tokens=usage["prompt_tokens"],
            completion_tokens=usage["completion_tokens"],
        )

    def settled(self) -> Reading:
        """What /metrics says once all nodes have told what they did. Raises BenchError if a process has died."""
        time.sleep(_SETTLE_S)
        self.check()
        return read(self.client.get("/metrics").text)

    def check(self) -> None:
        """Raises BenchError if a process has died."""
        self.supervisor.tick(time.monotonic())
        if dead := [child.spec.name for child in self.supervisor.children if child.failures]:
            raise BenchError(f"{dead[0]} ended before its time{self._last_words(dead[0])}")

    def line(self, role: str, marker: str) -> str | None:
        """The last line with `marker` that a role has written."""
        return next((line for line in reversed(self.said.get(role, [])) if marker in line), None)

    def _last_words(self, name: str = "server") -> str:
        return "".join(f"\n  {name} | {line}" for line in self.said.get(name, [])[-_NUM_LAST_WORDS:])


@contextmanager
def running(settings: ServeSettings, *, store: Path, cores: Cores, tell: Callable[[str], None]) -> Iterator[Running]:
    """All roles of `settings`, ready to be asked. Raises BenchError; leaves no process behind."""
    said: dict[str, list[str]] = {}
    with (
        listening.bind("127.0.0.1", 0) as listener,
        runtime_directory() as runtime,
        httpx.Client(base_url=listening.url(listener), timeout=_PROBE_S, trust_env=False) as client,
    ):
        plan = Plan(
            settings=settings,
            store=store,
            top_k=read_manifest(store).top_k,
            runtime=runtime,
            listener=listener,
            cores=1,
        )
        specs = [_pinned(spec, cores) for spec in children(plan)]
        spawn = spawn_with(lambda name, line: said.setdefault(name, []).append(line))
        supervisor = Supervisor(specs=specs, spawn=spawn)
        try:
            roles = Running(client=client, supervisor=supervisor, said=said)
            _await_all(roles, [spec.name for spec in specs if spec.name != "server"], tell)
            yield roles
        finally:
            supervisor.stop(hurry=lambda: False)


def _pinned(spec: ChildSpec, cores: Cores) -> ChildSpec:
    core = cores.beside if spec.name == "predictor" else cores.main
    return replace(spec, command=pinned(spec.command, core))


def _await_all(roles: Running, peers: list[str], tell: Callable[[str], None]) -> None:
    give_up_s = time.monotonic() + START_S
    while True:
        roles.check()
        health: dict[str, Any] | None = probe(roles.client)
        missing = "the server" if health is None else obstacle(health, expected=peers, patient=True)
        if missing is None:
            return
        if time.monotonic() > give_up_s:
            raise BenchError(f"not ready after {START_S:.0f} s: {missing}")
        tell(missing)
        time.sleep(_TICK_S)
