"""Real processes under one `odmoe serve`, killed and stopped in the midst of a stream: the text stays as it must be.

Also what the nodes' memory looks like afterwards, by their own account and by the kernel's.
"""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from transformers import AutoTokenizer

from support.reference import reference_tokens
from support.serve_process import Serving, alive, chat_checkpoint, serving, until

pytestmark = pytest.mark.slow

NUM_TOKENS = 96
BODY = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Tell me a long story"}],
    "temperature": 0,
    "ignore_eos": True,
    "max_tokens": NUM_TOKENS,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> str:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    prompt_ids = tokenizer.apply_chat_template(BODY["messages"], add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    text = tokenizer.decode(reference_tokens(checkpoint, prompt_ids, NUM_TOKENS), skip_special_tokens=True)
    assert isinstance(text, str)
    return text


def stream(server: Serving, *, at: int, do: Callable[[], None]) -> str:
    """The text of a stream, with something done after so many of its pieces."""
    text = ""
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json={**BODY, "stream": True}, timeout=90) as answer:
        for number, choice in enumerate(_choices(answer.iter_lines())):
            assert "error" not in choice, choice
            text += choice["delta"].get("content") or ""
            if number == at:
                do()
    return text


def _choices(lines: Iterator[str]) -> Iterator[dict[str, dict[str, str]]]:
    for line in lines:
        if line.startswith("data: ") and line != "data: [DONE]":
            event = json.loads(line.removeprefix("data: "))
            yield event["choices"][0] if "choices" in event else event


def metrics(server: Serving, name: str) -> dict[str, float]:
    """Samples of one family, by their labels."""
    page = httpx.get(f"{server.url}/metrics", timeout=10).text
    lines = [line for line in page.splitlines() if line.startswith(f"odmoe:{name}{{")]
    return {line[line.index("{") : line.rindex(" ")]: float(line.rsplit(" ", 1)[1]) for line in lines}


@pytest.mark.parametrize("role", ["node-0", "node-2", "odmoe_predictor"])
def test_killed_in_mid_stream(checkpoint: Path, expected: str, tmp_path: Path, role: str) -> None:
    with serving(checkpoint, tmp_path, "--slots", "1", nodes=3) as server:
        victim = server.child(role)

        def kill() -> None:
            os.kill(victim, signal.SIGKILL)
            until(lambda: not alive(victim), "its death")

        assert stream(server, at=10, do=kill) == expected


def test_stopped_and_continued_in_mid_stream(checkpoint: Path, expected: str, tmp_path: Path) -> None:
    with serving(checkpoint, tmp_path, "--slots", "1", nodes=3) as server:
        victim = server.child("node-1")
        assert stream(server, at=10, do=lambda: os.kill(victim, signal.SIGSTOP)) == expected
        os.kill(victim, signal.SIGCONT)
        assert stream(server, at=0, do=lambda: None) == expected


def test_memory_is_what_is_said_and_nothing_is_held_after_a_request(
    checkpoint: Path, expected: str, tmp_path: Path
) -> None:
    with serving(checkpoint, tmp_path, "--slots", "2") as server:
        assert stream(server, at=0, do=lambda: None) == expected
        until(lambda: set(metrics(server, "expert_accounted_bytes").values()) == {0.0}, "all slots to be free")
        budgets = metrics(server, "expert_budget_bytes")
        assert len(budgets) == 2
        assert min(budgets.values()) > 0
        said = metrics(server, "node_rss_bytes")
        for number in range(2):
            status = Path(f"/proc/{server.child(f'node-{number}')}/status").read_text()
            resident_kb = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
            assert said[f'{{node="node-{number}"}}'] == pytest.approx(resident_kb * 1024, rel=0.1)
