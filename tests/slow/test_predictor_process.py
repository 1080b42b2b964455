"""`odmoe-predictor` as a process of its own, over real sockets, with a server and a node that are scripted here."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import zmq

from odmoe_model.routers import load_routers
from odmoe_model.store import ExpertStore
from odmoe_model.tensors import to_blob
from odmoe_wire.checks import Limits
from odmoe_wire.link import DealerLink, Link, PeerGone, RouterLink
from odmoe_wire.messages import (
    Align,
    AnyMessage,
    Bye,
    Hello,
    Member,
    Refused,
    Routed,
    Schedule,
    Span,
    Start,
    ToNode,
    ToServer,
    View,
    Welcome,
)
from support.predictor_plain import FullModel, Routings, recall
from support.stores import tiny_store

pytestmark = pytest.mark.slow

PROMPT = [3, 17, 99, 4, 56, 23, 8, 120, 77, 31]
DEADLINE_S = 90.0
COMMAND = [sys.executable, "-m", "odmoe_predictor"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_store("qwen3_moe", tmp_path_factory.mktemp("process"))


@pytest.fixture
def context() -> Iterator["zmq.Context[zmq.Socket[bytes]]"]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield context
    context.destroy(linger=0)


@pytest.fixture
def server(context: "zmq.Context[zmq.Socket[bytes]]") -> Iterator[RouterLink]:
    link = RouterLink.bind("tcp://127.0.0.1:*", context=context, accept=ToServer, limits=Limits())
    yield link
    link.close()


def environment() -> dict[str, str]:
    roots = [str(Path(__file__).parents[2] / folder) for folder in ("predictor", "node_agent")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(roots), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


@pytest.fixture
def kind_options() -> list[str]:
    """Of the shadow: not ahead, or the test would take a forecast made on a wrong guess for the one it waits for."""
    return ["--run-ahead", "0"]


@pytest.fixture
def predictor(
    store: Path, server: RouterLink, tmp_path: Path, kind_options: list[str]
) -> Iterator[subprocess.Popen[str]]:
    options = ["--store", str(store), "--server-endpoint", server.endpoint, "--endpoint", f"ipc://{tmp_path}/nodes"]
    process = subprocess.Popen(
        [*COMMAND, *options, *kind_options, "--verify"],
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=tmp_path,
    )
    yield process
    process.kill()
    process.communicate(timeout=DEADLINE_S)


def until(found: Callable[[], bool], *, what: str) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not found():
        assert time.monotonic() < deadline_s, f"waited in vain for {what}"
        time.sleep(0.002)


def collect(link: Link, into: list[AnyMessage]) -> None:
    while (item := link.receive()) is not None:
        into.append(item[1].message)


def wait_for(link: Link, kind: type, took: list[AnyMessage]) -> None:
    def came() -> bool:
        collect(link, took)
        return any(isinstance(message, kind) for message in took)

    until(came, what=kind.__name__)


def join(server: RouterLink, took: list[AnyMessage]) -> None:
    wait_for(server, Hello, took)
    server.send("predictor", Welcome(heartbeat_s=1.0, lost_after_s=60.0), epoch=1)
    server.send("predictor", View(members=[Member("n1", 8)], group_size=1), epoch=1)


def test_forecasts_reach_server_and_node_and_sigterm_ends_it_politely(
    store: Path,
    server: RouterLink,
    predictor: subprocess.Popen[str],
    context: "zmq.Context[zmq.Socket[bytes]]",
    tmp_path: Path,
) -> None:
    at_server: list[AnyMessage] = []
    at_node: list[AnyMessage] = []
    join(server, at_server)
    hello = next(message for message in at_server if isinstance(message, Hello))
    opened = ExpertStore.open(store, verify=False)
    assert (hello.role, hello.peer_id, hello.store_digest) == ("predictor", "predictor", opened.manifest.digest)
    node = DealerLink.connect(
        f"ipc://{tmp_path}/nodes",
        identity="n1",
        peer="predictor",
        context=context,
        accept=ToNode,
        limits=Limits(),
    )

    def welcomed() -> bool:
        try:
            node.send("predictor", hello, epoch=0)
        except PeerGone:
            return False
        collect(node, at_node)
        return any(isinstance(message, Welcome) for message in at_node)

    until(welcomed, what="the node's welcome")
    recalls = decode(opened, server, node, at_server=at_server, at_node=at_node)
    assert sum(recalls) / len(recalls) > 0.9
    node.close()

    predictor.send_signal(signal.SIGTERM)
    wait_for(server, Bye, at_server)
    _, text = predictor.communicate(timeout=DEADLINE_S)
    assert predictor.returncode == 0, text
    for said in ("connected to the server", "int8", "the shadow's weights", "loaded in", "stopped"):
        assert said in text
    assert "Traceback" not in text


@pytest.mark.parametrize("kind_options", [["--kind", "gate", "--look-ahead", "2"]])
def test_another_kind_says_what_it_wants_and_forecasts_from_that(
    store: Path, server: RouterLink, predictor: subprocess.Popen[str]
) -> None:
    took: list[AnyMessage] = []
    join(server, took)
    assert {message.wants for message in took if isinstance(message, Hello)} == {"inputs"}
    opened = ExpertStore.open(store, verify=False)
    x_TH = torch.randn(1, opened.manifest.hidden_size, generator=torch.Generator().manual_seed(1))
    span = Span(1, len(PROMPT), 1)
    server.send("predictor", Start(sequence=1), epoch=1)
    server.send("predictor", Align(sequence=1, position=span.position, tokens=[5], cache=[]), epoch=1)
    server.send("predictor", Routed(span=span, layer=0, experts=[0, 1, 2]), epoch=1, blobs=[to_blob(x_TH)])
    wait_for(server, Schedule, took)
    with torch.inference_mode():
        expected = sorted(load_routers(opened)[2](x_TH)[0].tolist())
    assert routings(took, span.position) == {2: expected}
    predictor.send_signal(signal.SIGTERM)
    _, text = predictor.communicate(timeout=DEADLINE_S)
    assert predictor.returncode == 0, text
    assert "the gate predictor holds" in text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--kind", "gate", "--look-ahead", "9"], "a look-ahead of 9 layers forecasts nothing in a model of 3"),
        (["--kind", "trained", "--weights", "no-such"], "no-such cannot be read"),
    ],
)
def test_a_kind_that_cannot_be_is_refused_in_a_line(
    store: Path, server: RouterLink, tmp_path: Path, options: list[str], said: str
) -> None:
    command = [*COMMAND, "--store", str(store), "--server-endpoint", server.endpoint, *options]
    command += ["--endpoint", f"ipc://{tmp_path}/nodes"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=DEADLINE_S, check=False)
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def decode(
    store: ExpertStore, server: RouterLink, node: Link, *, at_server: list[AnyMessage], at_node: list[AnyMessage]
) -> list[float]:
    """Recall of twelve steps; server and node must have been told the same."""
    full = FullModel(store)
    token, rows = full.step(PROMPT), len(PROMPT)
    server.send("predictor", Start(sequence=1), epoch=1)
    recalls = []
    for _ in range(12):
        layers, tensors = full.export(rows)
        align = Align(sequence=1, position=full.length, tokens=[token], cache=layers)
        server.send("predictor", align, epoch=1, blobs=[to_blob(tensor) for tensor in tensors])
        position = full.length

        def told(position: int = position) -> bool:
            collect(server, at_server)
            collect(node, at_node)
            needed = store.manifest.num_moe_layers
            return len(routings(at_server, position)) == len(routings(at_node, position)) == needed

        until(told, what=f"the forecast of position {position}")
        assert routings(at_server, position) == routings(at_node, position)
        token, rows = full.step([token]), 1
        recalls.append(recall(routings(at_server, position), full.routings))
    return recalls


def routings(took: list[AnyMessage], position: int) -> Routings:
    return {
        message.layer: message.experts
        for message in took
        if isinstance(message, Schedule) and message.span.position == position
    }


def test_refusal_ends_it_with_the_reason(server: RouterLink, predictor: subprocess.Popen[str]) -> None:
    wait_for(server, Hello, [])
    server.send("predictor", Refused(reason="its store has digest abc"), epoch=0)
    _, text = predictor.communicate(timeout=DEADLINE_S)
    assert predictor.returncode == 1
    assert "refused this predictor: its store has digest abc" in text


def test_store_that_is_none_is_refused_in_a_line() -> None:
    command = [*COMMAND, "--store", "/nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=DEADLINE_S, check=False)
    assert done.returncode == 1
    assert "/nowhere is not an expert store" in done.stderr
    assert "Traceback" not in done.stderr


def test_it_ends_with_the_process_that_started_it(store: Path, server: RouterLink, tmp_path: Path) -> None:
    options = ["--store", str(store), "--server-endpoint", server.endpoint, "--endpoint", f"ipc://{tmp_path}/nodes"]
    command = [*COMMAND, *options, "--exit-with-parent"]
    script = f"""
import subprocess, sys, time
with open({str(tmp_path / "log")!r}, "w") as log:
    print(subprocess.Popen({command!r}, stdout=log, stderr=log).pid, flush=True)
sys.stdin.read()
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    took: list[AnyMessage] = []
    join(server, took)
    parent.kill()
    parent.communicate(timeout=DEADLINE_S)
    wait_for(server, Bye, took)
    until(lambda: not alive(pid), what="the predictor's end")


def alive(pid: int) -> bool:
    """Whether the process runs; one that nobody has reaped yet does not."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return False
    return re.search(r"State:\s+Z", status) is None
