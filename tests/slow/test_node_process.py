"""`odmoe-node` as a real process."""

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import zmq

from odmoe_model.experts import ExpertMaths
from odmoe_model.store import ExpertStore
from odmoe_wire.messages import Bye, Hello, Refused, Result, SlotReport
from support.node_zmq import ScriptedServer, random_rows, rows_of
from support.stores import tiny_store

pytestmark = pytest.mark.slow
WAIT_S = 60


@pytest.fixture(scope="module")
def store_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_store("mixtral", tmp_path_factory.mktemp("process"))


@pytest.fixture
def server(store_path: Path, tmp_path: Path) -> Iterator[ScriptedServer]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    store = ExpertStore.open(store_path, verify=False)
    server = ScriptedServer(f"ipc://{tmp_path}/server", store, context=context)
    yield server
    server.close()
    context.destroy(linger=0)


def command(store_path: Path, endpoint: str, *flags: str) -> list[str]:
    return [
        *(sys.executable, "-m", "odmoe_node", "--store", str(store_path), "--server-endpoint", endpoint),
        *("--node-id", "n", *flags),
    ]


@pytest.fixture
def processes() -> Iterator[list["subprocess.Popen[str]"]]:
    """Processes put in here are killed at the end if they still run."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=WAIT_S)


def start(processes: list["subprocess.Popen[str]"], *args: str) -> "subprocess.Popen[str]":
    process = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    processes.append(process)
    return process


def test_a_node_connects_computes_reports_and_ends_cleanly_on_sigterm(
    store_path: Path, server: ScriptedServer, processes: list["subprocess.Popen[str]"]
) -> None:
    process = start(processes, *command(store_path, server.link.endpoint, "--memory-mb", "1"))
    server.admit("n")
    store = ExpertStore.open(store_path, verify=False)
    fields = store.fields(store.record(1, 4))
    x_NH = random_rows(3)
    server.compute("n", 1, 4, x_NH, request_id=1)
    assert torch.equal(rows_of(server.expect(Result)[1]), ExpertMaths(store.manifest).rows(fields, x_NH))
    report = server.expect(SlotReport)[1].message
    assert isinstance(report, SlotReport)
    assert report.accounted_bytes == 0
    assert report.arena_bytes <= report.budget_bytes == 1_000_000
    assert report.arena_bytes + store.manifest.record_bytes > report.budget_bytes
    process.send_signal(signal.SIGTERM)
    server.expect(Bye)
    output, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, output
    assert "memory_mb" in output
    assert "n is connected to the server" in output


def test_a_refused_node_says_why_and_fails(
    store_path: Path, server: ScriptedServer, processes: list["subprocess.Popen[str]"]
) -> None:
    process = start(processes, *command(store_path, server.link.endpoint))
    server.expect(Hello)
    server.link.send("n", Refused(reason="its store has digest 1234, the server's 5678"), epoch=0)
    output, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 1
    assert "its store has digest 1234" in output


def test_a_node_with_less_memory_than_an_expert_says_that_it_slices(
    tmp_path: Path, processes: list["subprocess.Popen[str]"]
) -> None:
    # 3 x 64 x 6000 floats: 4.6 MB an expert.
    store_path = tiny_store("mixtral", tmp_path, intermediate_size=6000, num_hidden_layers=1)
    node = start(processes, *command(store_path, f"ipc://{tmp_path}/nobody", "--memory-mb", "4"))
    assert node.stdout is not None
    line = next(line for line in node.stdout if "does not fit" in line)
    assert "an expert of 4.6 MB does not fit 4.0 MB" in line
    assert "slices" in line


def test_a_node_ends_with_its_parent(
    store_path: Path, server: ScriptedServer, processes: list["subprocess.Popen[str]"]
) -> None:
    node = command(store_path, server.link.endpoint, "--exit-with-parent")
    script = "import subprocess, sys; p = subprocess.Popen(sys.argv[1:]); print(p.pid, flush=True); p.wait()"
    parent = start(processes, sys.executable, "-c", script, *node)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    server.admit("n")
    server.expect(SlotReport)
    fd = os.pidfd_open(pid)
    parent.kill()
    server.expect(Bye)
    ended, _, _ = select.select([fd], [], [], WAIT_S)
    os.close(fd)
    assert ended, "the node outlived its parent"
