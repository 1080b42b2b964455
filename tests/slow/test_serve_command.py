"""`odmoe serve` from the outside: one command, an answer, and no process left behind."""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from support.serve_process import Serving, alive, chat_checkpoint, family_of, serving, text_of, until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def running(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """One for all tests that leave it as they found it."""
    with serving(checkpoint, tmp_path_factory.mktemp("running")) as server:
        yield server


def gone(family: list[int]) -> bool:
    return not any(map(alive, family))


def test_the_curl_line_it_prints_works(running: Serving) -> None:
    assert len(family_of(running.process.pid)) == 4
    curl = next(line for line in running.log.read_text().splitlines() if line.startswith("curl "))
    done = subprocess.run(shlex.split(curl), capture_output=True, text=True, timeout=60, check=True)
    assert '"finish_reason"' in done.stdout


def test_the_terminal_chat_shows_the_same_answer(running: Serving) -> None:
    whole = text_of(running.answer(max_tokens=24))
    chat = [sys.executable, "-m", "odmoe_server", "chat", "Hello", "--url", running.url]
    chat += ["--temperature", "0", "--max-tokens", "24"]
    shown = subprocess.run(chat, capture_output=True, timeout=60, check=True, stdin=subprocess.DEVNULL)
    assert shown.stdout.decode() == "".join(c for c in whole if c.isprintable() or c in "\n\t") + "\n"


def test_a_port_in_use_is_told_at_once(running: Serving, checkpoint: Path) -> None:
    port = running.url.rpartition(":")[2]
    command = [sys.executable, "-m", "odmoe_server", "serve", "--model", str(checkpoint), "--port", port]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert f"port {port} is in use" in done.stderr
    assert "--port" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("role", ["node-0", "odmoe_predictor", "server.toml"])
def test_a_child_that_dies_is_started_again(running: Serving, role: str) -> None:
    before = text_of(running.answer(max_tokens=16))
    old = running.child(role)
    os.kill(old, signal.SIGKILL)
    until(lambda: not alive(old), "its death")
    until(lambda: is_whole(running), "all to be there again")
    assert text_of(running.answer(max_tokens=16)) == before
    assert "ended with signal SIGKILL; starting it again" in running.log.read_text()


def is_whole(server: Serving) -> bool:
    health = server.health()
    nodes = health.get("nodes")
    return (
        health.get("state") == "ready"
        and isinstance(nodes, list)
        and sum(node["alive"] for node in nodes) == 3
        and len(family_of(server.process.pid)) == 4
    )


def test_killed_hard_it_leaves_no_orphans(checkpoint: Path, tmp_path: Path) -> None:
    with serving(checkpoint, tmp_path, nodes=1) as server:
        family = family_of(server.process.pid)
        assert len(family) == 3
        assert server.end(signal.SIGKILL) == -signal.SIGKILL
        until(lambda: gone(family), "the end of the family")


def test_told_to_end_it_ends_all_of_it_and_tells_who_still_listens(checkpoint: Path, tmp_path: Path) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "stream": True, "ignore_eos": True}
    with serving(checkpoint, tmp_path, "--drain-s", "1", nodes=1) as server:
        family = family_of(server.process.pid)
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60) as answer:
            received = []
            for line in answer.iter_lines():
                if not received:
                    server.process.send_signal(signal.SIGINT)
                received.append(line)
        last = [line for line in received if line][-1]
        assert last == "data: [DONE]" or "error" in last, "never a bare end"
        assert server.process.wait(60) == 0
        assert gone(family)
    assert not list(tmp_path.glob("odmoe-*")), "the runtime directory is gone"
