"""A cluster of real processes whose links all go through proxies, and how each kind of fault is done to it.

Knows the roles' flags, and nothing of what clients ask.
"""

import asyncio
import random
import signal
import socket
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx

from chaos import roles
from chaos.faults import OF_PROCESSES, Fault
from chaos.proxy import Proxy
from odmoe_wire.keys import make

READY_S: Final = 120.0
_PROBE_S: Final = 0.1
_GIVEN_OUT: Final = Path("/proc/sys/net/ipv4/ip_local_port_range")  # to who asks for any port
_MOST_PORTS: Final = 100


def free_port() -> int:
    """One that nobody listens on now, and that the kernel gives nobody: while the server is gone, a connection of
    anyone's would else be given its port, and even one to that port itself."""
    lowest, highest = 10_000, int(_GIVEN_OUT.read_text().split()[0]) if _GIVEN_OUT.exists() else 32_768
    for _ in range(_MOST_PORTS):
        port = random.SystemRandom().randrange(lowest, highest)
        with closing(socket.socket()) as found, suppress(OSError):
            found.bind(("127.0.0.1", port))
            return port
    raise OSError(f"no port is free between {lowest} and {highest}")


@dataclass
class Cluster:
    """Server, predictor and nodes, with `curve` on links that are encrypted and for those with a key only. `proxies`
    are by (client, server) of the link."""

    store: Path
    home: Path
    num_nodes: int
    seed: int
    curve: bool = False
    processes: roles.Processes = field(default_factory=roles.Processes)
    proxies: dict[tuple[str, str], Proxy] = field(default_factory=dict)
    _http: int = field(default_factory=free_port)
    _ports: dict[str, int] = field(default_factory=lambda: {name: free_port() for name in ("server", "predictor")})

    @property
    def url(self) -> str:
        """Where the API is."""
        return f"http://127.0.0.1:{self._http}"

    @property
    def nodes(self) -> list[str]:
        """Their names."""
        return [f"node-{number}" for number in range(self.num_nodes)]

    async def start(self) -> None:
        """Until everyone takes part."""
        dice = random.Random(self.seed)
        links = [("predictor", "server"), *((n, s) for n in self.nodes for s in ("server", "predictor"))]
        for client, server in links:
            proxy = self.proxies[client, server] = Proxy(self._ports[server], dice=random.Random(dice.random()))
            await proxy.start()
        self._add_all()
        for process in self.processes.of.values():
            process.start()
        await self.whole()

    async def stop(self) -> None:
        """Leave nothing behind."""
        self.processes.kill_all()
        for proxy in self.proxies.values():
            await proxy.stop()

    async def whole(self) -> None:
        """Wait until everyone takes part. Raises TimeoutError."""
        everyone = {"predictor", *self.nodes}
        others = [self.processes.of[name] for name in everyone]
        health: dict[str, Any] = {}
        async with httpx.AsyncClient(base_url=self.url, trust_env=False) as http:
            try:
                async with asyncio.timeout(READY_S):
                    while not (
                        health.get("state") == "ready"
                        and everyone <= _alive(health)
                        and all(process.has_joined or process.is_away for process in others)
                    ):
                        self._look_for_the_dead()
                        await asyncio.sleep(_PROBE_S)
                        health = await _health(http)
            except TimeoutError:
                raise TimeoutError(f"not whole again; the server says {health}; logs are in {self.home}") from None

    def _look_for_the_dead(self) -> None:
        """Nobody ends by itself."""
        for process in self.processes.of.values():
            if not process.is_away and process.exit_code is not None:
                raise AssertionError(f"{process.name} ended with {process.exit_code}; see {process.log}")

    async def befall(self, fault: Fault) -> None:
        """Do it, hold it, undo it; the process is back when this returns."""
        if fault.kind in OF_PROCESSES:
            await self._befall_process(fault)
        else:
            await self._befall_links(fault)

    async def _befall_process(self, fault: Fault) -> None:
        process = self.processes.of[fault.target]
        if fault.kind == "pause":
            process.send(signal.SIGSTOP)
            await asyncio.sleep(fault.hold_s)
            process.send(signal.SIGCONT)
            return
        process.is_away = True
        process.send(signal.SIGKILL if fault.kind == "kill" else signal.SIGTERM)
        await process.ended()
        if fault.kind == "restart" and process.exit_code != 0:
            raise AssertionError(f"{process.name} ended with {process.exit_code} when told to; see {process.log}")
        await asyncio.sleep(fault.hold_s)
        process.start()

    async def _befall_links(self, fault: Fault) -> None:
        hit = [proxy for ends, proxy in self.proxies.items() if fault.target in ends]
        for proxy in hit:
            _spoil(proxy, fault)
        await asyncio.sleep(fault.hold_s)
        for proxy in hit:
            proxy.weather.clear()

    def _add_all(self) -> None:
        keys: dict[str, object] = {}
        if self.curve:
            keys["keys-dir"] = self.home / "keys"
            make(self.home / "keys", ["server", "predictor", *self.nodes])
        for name, role, options in self._plan():
            common = {**keys, "model" if role == "server" else "store": self.store}
            self.processes.add(name, role, {**common, **options}, log=self.home / f"{name}.log")

    def _plan(self) -> Iterator[tuple[str, str, dict[str, object]]]:
        own = {name: f"tcp://127.0.0.1:{port}" for name, port in self._ports.items()}
        yield "server", "server", {"port": self._http, "endpoint": own["server"], "served-model-names": "tiny"}
        yield "predictor", "predictor", {"endpoint": own["predictor"], **self._ways("predictor", "server")}
        for name in self.nodes:
            yield name, "node", {"node-id": name, "slots": 2, **self._ways(name, "server", "predictor")}

    def _ways(self, client: str, *servers: str) -> dict[str, object]:
        """Where a client finds the others: at its proxies."""
        return {f"{server}-endpoint": f"tcp://127.0.0.1:{self.proxies[client, server].port}" for server in servers}


def _spoil(proxy: Proxy, fault: Fault) -> None:
    weather = proxy.weather
    match fault.kind:
        case "delay":
            weather.delay_s = fault.strength
        case "drop":
            weather.drop = fault.strength
        case "duplicate":
            weather.duplicate = fault.strength
        case "partition" if fault.silent:
            weather.held.clear()
        case "partition":
            weather.cut = True
            proxy.cut_all()


async def _health(http: httpx.AsyncClient) -> dict[str, Any]:
    try:
        body = (await http.get("/health")).json()
    except (httpx.TransportError, ValueError):
        return {}
    return body if isinstance(body, dict) else {}


def _alive(health: dict[str, Any]) -> set[str]:
    return {node["id"] for node in health.get("nodes", ()) if node["alive"]}
