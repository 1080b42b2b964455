"""`odmoe serve` as a process of its own, with a tiny random model that has the tests' tokenizer."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from odmoe_model.prepare import prepare
from support.scripted_engine import tiny_tokenizer
from support.tiny import tiny_checkpoint

DEADLINE_S = 120.0


def chat_checkpoint(directory: Path) -> Path:
    """A checkpoint that can chat, if not sensibly."""
    tokenizer = tiny_tokenizer()
    end_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tiny_checkpoint("mixtral", directory, vocab_size=len(tokenizer), eos_token_id=end_id)
    tokenizer.save_pretrained(directory)
    return directory


def chat_store(directory: Path) -> Path:
    """The same, prepared."""
    prepare(chat_checkpoint(directory / "checkpoint"), directory / "store")
    return directory / "store"


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for something that other processes do."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, f"waited in vain for {what}"
        time.sleep(0.05)


def family_of(pid: int) -> list[int]:
    """The living children of a process."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(word) for word in listed.stdout.split()]


def alive(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def command_of(pid: int) -> str:
    """Its command line."""
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")


@dataclass
class Serving:
    """A running `odmoe serve`."""

    process: "subprocess.Popen[bytes]"
    url: str
    log: Path

    def health(self) -> dict[str, object]:
        """What /health says; nothing while nobody listens."""
        try:
            answer: dict[str, object] = httpx.get(f"{self.url}/health", timeout=5).json()
        except httpx.TransportError:
            return {}
        return answer

    def child(self, role: str) -> int:
        """The process id of a role."""
        return next(pid for pid in family_of(self.process.pid) if role in command_of(pid))

    def answer(self, **fields: object) -> httpx.Response:
        """Ask something."""
        body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "temperature": 0, **fields}
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=DEADLINE_S)

    def end(self, sign: signal.Signals) -> int:
        """Ask it to end; the exit status."""
        self.process.send_signal(sign)
        return self.process.wait(DEADLINE_S)


@contextmanager
def serving(checkpoint: Path, home: Path, *options: str, nodes: int = 2) -> Iterator[Serving]:
    """Start it and wait until it has greeted; whatever is left of it at the end is killed."""
    command: Sequence[str] = [sys.executable, "-m", "odmoe_server", "serve", "--model", str(checkpoint)]
    command = [*command, "--port", "0", "--served-model-names", "tiny", "--nodes", str(nodes), *options]
    log = home / "serve.log"
    environment = {**os.environ, "XDG_CACHE_HOME": str(home / "cache"), "TMPDIR": str(home)}
    environment.pop("XDG_RUNTIME_DIR", None)
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, stdout=stderr, stderr=stderr, env=environment, start_new_session=True)
    children: list[int] = []
    try:
        yield Serving(process, _greeted_url(process, log), log)
        children = family_of(process.pid)
    finally:
        children = children or family_of(process.pid)
        process.kill()
        process.wait()
        for pid in filter(alive, children):
            os.kill(pid, signal.SIGKILL)


def _greeted_url(process: "subprocess.Popen[bytes]", log: Path) -> str:
    def greeted() -> re.Match[str] | None:
        assert process.poll() is None, log.read_text()
        return re.search(r"odmoe serves 'tiny' at (http://[\d.:]+)/v1", log.read_text())

    until(lambda: greeted() is not None, "the greeting")
    match = greeted()
    assert match is not None
    return match[1]


def text_of(answer: httpx.Response) -> str:
    """The text of a whole answer."""
    assert answer.status_code == 200, answer.text
    return str(json.loads(answer.text)["choices"][0]["message"]["content"])
