"""Broken messages at the real socket of every role's real process, and at its TCP port bytes that are no messages.

Afterwards each role must be alive, have counted what it refused, have no unforeseen error in its log, and do its work.
Two messages are left out of what a node or predictor hears: a server may send it away (`Refused`) or leave (`Bye`).
"""

import random
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
import zmq

from chaos.cluster import free_port
from chaos.roles import Process, Processes
from odmoe_wire import messages as m
from odmoe_wire.codec import Decoder, ProtocolError, encode
from support.mutations import drawn
from support.sample_messages import LIMITS

# What each role's log must not have: an event its state machine did not foresee.
_UNFORESEEN: Final = ("failed on an event", "Traceback")
_PATIENCE_S: Final = 120.0
_TCP_CONNECTIONS: Final = 20


@dataclass(kw_only=True)
class Sockets:
    """`sent` and `refused` by role, as counted by the role itself where it tells."""

    sent: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)


@dataclass(kw_only=True)
class _Rig:
    """A server; and a node and a predictor whose server we are."""

    home: Path
    store: Path
    context: "zmq.Context[zmq.Socket[bytes]]"
    processes: Processes = field(default_factory=Processes)
    ports: dict[str, int] = field(default_factory=lambda: {n: free_port() for n in ("http", "server", "predictor")})

    def start(self) -> None:
        self.ours = self.context.socket(zmq.ROUTER)
        self.ours.linger = 0
        self.ours.sndhwm = 0  # nothing is to be lost here
        our_port = self.ours.bind_to_random_port("tcp://127.0.0.1")
        own = {name: f"tcp://127.0.0.1:{self.ports[name]}" for name in ("server", "predictor")}
        us = f"tcp://127.0.0.1:{our_port}"
        common: dict[str, object] = {"store": self.store, "server-endpoint": us}
        self._add("server", {"model": self.store, "port": self.ports["http"], "endpoint": own["server"]})
        self._add("node", {**common, "node-id": "node-1", "predictor-endpoint": own["predictor"]})
        self._add("predictor", {**common, "endpoint": own["predictor"]})

    def _add(self, role: str, options: dict[str, object]) -> None:
        self.processes.add(role, role, options, log=self.home / f"{role}.log").start()

    def hear(self, peer: str, kind: type[m.AnyMessage]) -> Any:
        """The next message of a kind from a node or predictor that takes us for its server."""
        decoder = Decoder(accept=m.ToServer, limits=LIMITS)
        until_s = time.monotonic() + _PATIENCE_S
        while time.monotonic() < until_s:
            if self.ours.poll(100):
                sender, *frames = self.ours.recv_multipart()
                message = decoder.decode(frames).message
                if sender.decode() == peer and isinstance(message, kind):
                    return message
        raise AssertionError(f"{peer} does not say {kind.__name__}; its log is in {self.home}")

    def until_server_answers(self) -> None:
        """It takes its time to start."""
        until_s = time.monotonic() + _PATIENCE_S
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{self.ports['http']}/health", timeout=5, trust_env=False)
                return
            except httpx.TransportError:
                assert time.monotonic() < until_s, f"the server does not start; its log is in {self.home}"
                time.sleep(0.1)

    def tell(self, peer: str, message: m.AnyMessage) -> None:
        """Sound words."""
        self.ours.send_multipart([peer.encode(), *encode(message, epoch=1)])

    def welcome(self, peer: str) -> None:
        """Take a node or the predictor in."""
        self.hear(peer, m.Hello)
        self.tell(peer, m.Welcome(heartbeat_s=0.1, lost_after_s=60.0))
        self.tell(peer, m.View(members=[m.Member("node-1", 2)], group_size=1))


def run(*, count: int, seed: int, store: Path, home: Path) -> Sockets:
    """Throw `count` messages at each role. Raises AssertionError when one did not bear it."""
    dice = random.Random(seed)
    done = Sockets()
    with _rig(home, store) as rig:
        _at_node_and_predictor(rig, dice, count=count, done=done)
        rig.until_server_answers()
        _at_router(rig, dice, "server", m.ToServer, count=count, done=done)
        _at_router(rig, dice, "predictor", m.ToPredictor, count=count, done=done)
        for name in ("server", "predictor"):
            _at_port(rig.ports[name], dice)
        _still_at_work(rig, done)
    return done


@contextmanager
def _rig(home: Path, store: Path) -> Iterator[_Rig]:
    with ExitStack() as exits:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        exits.callback(context.destroy, linger=0)
        rig = _Rig(home=home, store=store, context=context)
        exits.callback(rig.processes.kill_all)
        rig.start()
        yield rig


def _at_node_and_predictor(rig: _Rig, dice: random.Random, *, count: int, done: Sockets) -> None:
    """They connect to whom they take for their server."""
    for peer, union in (("node-1", m.ToNode), ("predictor", m.ToPredictor)):
        rig.welcome(peer)
        for frames in _broken(dice, union, count):
            rig.ours.send_multipart([peer.encode(), *frames])
        done.sent[peer] = count


def _at_router(rig: _Rig, dice: random.Random, name: str, union: Any, *, count: int, done: Sockets) -> None:
    """It lets us connect."""
    with rig.context.socket(zmq.DEALER) as raw:
        raw.linger = int(1000 * _PATIENCE_S)
        raw.sndhwm = count
        raw.routing_id = b"intruder"
        raw.connect(f"tcp://127.0.0.1:{rig.ports[name]}")
        for frames in _broken(dice, union, count):
            raw.send_multipart(frames)
    done.sent[name] = done.sent.get(name, 0) + count


def _broken(dice: random.Random, union: Any, count: int) -> Iterator[list[bytes]]:
    """Messages with something wrong; those that happen to be sound are sent too, but for the two."""
    decoder = Decoder(accept=union, limits=LIMITS)
    while count:
        frames, accept = drawn(dice)
        if accept is not union or not frames:
            continue
        with suppress(ProtocolError):
            if isinstance(decoder.decode(frames).message, m.Refused | m.Bye):
                continue
        count -= 1
        yield frames


def _at_port(port: int, dice: random.Random) -> None:
    """Bytes that are no ZMTP, and connections that say nothing."""
    for number in range(_TCP_CONNECTIONS):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as raw, suppress(OSError):
            if number % 2:
                raw.sendall(dice.randbytes(dice.randint(1, 4096)))


def _still_at_work(rig: _Rig, done: Sockets) -> None:
    rig.tell("node-1", m.Cancel(sequence=1))
    until_s = time.monotonic() + _PATIENCE_S
    before: dict[str, int] = {}
    # What was thrown at them may still wait in their queues: until the counts stand still.
    while time.monotonic() < until_s and (before != done.refused or min(before.values(), default=0) == 0):
        before = dict(done.refused)
        done.refused["node-1"] = rig.hear("node-1", m.SlotReport).protocol_errors_total
        done.refused["predictor"] = rig.hear("predictor", m.ShadowReport).protocol_errors_total
        done.refused["server"] = _errors_of_server(rig)
    assert min(done.refused.values()) > 0, f"nothing was counted: {done}"
    for process in rig.processes.of.values():
        _bore_it(process)


def _errors_of_server(rig: _Rig) -> int:
    page = httpx.get(f"http://127.0.0.1:{rig.ports['http']}/metrics", timeout=_PATIENCE_S, trust_env=False).text
    line = next(line for line in page.splitlines() if line.startswith("odmoe:protocol_errors_total"))
    return int(float(line.rsplit(" ", 1)[1]))


def _bore_it(process: Process) -> None:
    assert process.is_alive, f"{process.name} ended with {process.exit_code}; see {process.log}"
    log = process.log.read_text(encoding="utf-8", errors="replace")
    for word in _UNFORESEEN:
        before, found, after = log.partition(word)
        assert not found, f"{process.name}: {before[-500:]}{found}{after[:3000]}"
