"""The ten containers of docker-compose.yml, up and down, and what one may do to them. Knows no test."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx

from chaos.cluster import free_port
from containers.engine import ROOT, Engine
from odmoe_wire.keys import make

PROJECT: Final = "odmoe-test"
ROLES: Final = ("node", "predictor", "server")
NODES: Final = tuple(f"node-{number}" for number in range(8))
SERVICES: Final = ("server", "predictor", *NODES)
NOBODY: Final = 10001
_BUILD_S: Final = 900
_UP_S: Final = 240
_READY_S: Final = 240


@dataclass(frozen=True)
class Ten:
    """Running containers; `url` is the published port."""

    engine: Engine
    url: str

    def docker(self, *words: str) -> str:
        """What a docker command prints."""
        return self.engine.run("docker", *words)

    def inspect(self, service: str) -> dict[str, Any]:
        """All the engine knows of a service's container."""
        (found,) = json.loads(self.docker("inspect", self.container(service)))
        assert isinstance(found, dict)
        return found

    def container(self, service: str) -> str:
        """Its id."""
        label = "label=com.docker.compose"
        filters = [f"{label}.project={PROJECT}", f"{label}.service={service}"]
        return self.docker("ps", "-aq", *(f"--filter={one}" for one in filters))

    def kill(self, service: str) -> None:
        """As if it had crashed: the engine starts it again only when told to, since it was told to kill."""
        self.docker("kill", self.container(service))

    def start(self, service: str) -> None:
        """Again."""
        self.docker("start", self.container(service))

    def pause(self, service: str) -> None:
        """It stands still, connections open."""
        self.docker("pause", self.container(service))

    def unpause(self, service: str) -> None:
        """It goes on."""
        self.docker("unpause", self.container(service))

    def health(self) -> dict[str, Any]:
        """What the server says; nothing while it does not answer."""
        try:
            body = httpx.get(f"{self.url}/health", timeout=5, trust_env=False).json()
        except (httpx.TransportError, ValueError):
            return {}
        return body if isinstance(body, dict) else {}

    def is_whole(self) -> bool:
        """Whether everyone takes part."""
        return self.health().get("state") == "ready" and {"predictor", *NODES} <= self.alive()

    def alive(self) -> set[str]:
        """Who takes part, by the server's word."""
        return {node["id"] for node in self.health().get("nodes", ()) if node["alive"]}

    def is_healthy(self, service: str) -> bool:
        """What the engine's own health check says."""
        return bool(self.inspect(service)["State"]["Health"]["Status"] == "healthy")

    def until(self, condition: Callable[[], bool], what: str, *, timeout_s: float = _READY_S) -> None:
        """Wait for it; what the containers said comes with the failure."""
        until_s = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < until_s, f"waited in vain for {what}: {self.health()}\n{self.last_words()}"
            time.sleep(0.5)

    def last_words(self) -> str:
        """The end of every log."""
        return "\n".join(
            f"--- {service}\n" + self.engine.run("docker", "logs", "--tail=8", self.container(service))
            for service in SERVICES
        )


def build(engine: Engine) -> None:
    """The images `make image` makes."""
    for role in ROLES:
        command = ["docker", "build", "-q", f"--target={role}", *engine.build_args, f"--tag=odmoe-{role}:local", "."]
        engine.run(*command, timeout_s=_BUILD_S)


@contextmanager
def running(engine: Engine, *, store: Path, home: Path) -> Iterator[Ten]:
    """All ten, taking part; all gone at the end, their networks too."""
    port = free_port()
    environment = {
        "ODMOE_STORE": str(store),
        "ODMOE_KEYS": str(_keys(home / "keys")),
        "ODMOE_PORT": str(port),
        "ODMOE_UID": str(NOBODY if os.getuid() == 0 else os.getuid()),
        "ODMOE_GID": str(NOBODY if os.getuid() == 0 else os.getgid()),
        "ODMOE_MODEL_NAME": "tiny",
    }
    compose = [*engine.compose, "-p", PROJECT, "-f", str(ROOT / "docker-compose.yml")]
    engine.run(*compose, "down", timeout_s=_UP_S, **environment)  # of a run that was killed
    ten = Ten(engine, f"http://127.0.0.1:{port}")
    try:
        engine.run(*compose, "up", "-d", timeout_s=_UP_S, **environment)
        ten.until(ten.is_whole, "all ten to take part")
        yield ten
    finally:
        engine.run(*compose, "down", "-t", "5", timeout_s=_UP_S, **environment)


def _keys(folder: Path) -> Path:
    """As `make up` has them: readable by whom the services run as."""
    make(folder, ["server", "predictor", *NODES])
    if os.getuid() == 0:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
    return folder
