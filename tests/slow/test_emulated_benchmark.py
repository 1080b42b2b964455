"""What benchmarks stand on: a random checkpoint made by the command, and emulated devices with the speed of a link."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from transformers import AutoTokenizer

from support.reference import reference_tokens
from support.serve_process import serving, text_of, until

pytestmark = pytest.mark.slow

LINK_GBPS = 0.02
MAKE = [sys.executable, "-m", "odmoe_server", "make-checkpoint"]
SHAPE = ["--layers", "3", "--hidden", "64", "--intermediate", "96", "--vocab", "400", "--context", "512"]
WATCHED = """
import resource, sys
from pathlib import Path
from odmoe_model.random_checkpoint import RandomCheckpoint
from odmoe_model.random_shape import RandomShape

def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def write(name, **sizes):
    plan = RandomCheckpoint(RandomShape(family="mixtral", layers=1, hidden=512, **sizes))
    plan.write(Path(sys.argv[1]) / name)
    return plan.total_bytes

write("small", intermediate=16)
before = peak_bytes()
print(write("large", intermediate=30_000), peak_bytes() - before)
"""


def total(page: str, name: str) -> float:
    """The sum of a sample over all nodes."""
    return sum(float(value) for value in re.findall(rf"^odmoe:{name}\{{.*\}} (\S+)$", page, flags=re.MULTILINE))


def test_served_on_emulated_devices_it_answers_as_transformers_does_at_the_speed_of_the_link(tmp_path: Path) -> None:
    subprocess.run([*MAKE, str(tmp_path / "checkpoint"), *SHAPE], check=True, timeout=120)
    options = ["--node-device", "emulated", "--link-gbps", str(LINK_GBPS)]
    with serving(tmp_path / "checkpoint", tmp_path, *options) as server:
        text = text_of(server.answer(max_tokens=24))
        # What nodes tell of themselves comes with their heartbeats.
        until(
            lambda: total(httpx.get(f"{server.url}/metrics").text, "expert_load_seconds_count") > 24,
            "the nodes' reports",
        )
        page = httpx.get(f"{server.url}/metrics").text
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "checkpoint", local_files_only=True)
    question = [{"role": "user", "content": "Hello"}]
    prompt_ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    expected = reference_tokens(tmp_path / "checkpoint", prompt_ids, 24)
    assert text == tokenizer.decode(expected, skip_special_tokens=True)
    taken_s, least_s = (
        total(page, "expert_load_seconds_sum"),
        total(page, "expert_load_bytes_total") / (LINK_GBPS * 1e9),
    )
    assert least_s > 0.1
    assert taken_s >= 0.999 * least_s, "loads take the link's time"


def test_a_large_checkpoint_is_written_in_little_memory(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(tmp_path)], capture_output=True, text=True, timeout=240, check=True
    )
    total_bytes, peak_bytes = map(int, done.stdout.split())
    print(f"{total_bytes / 1e6:.0f} MB were written, the peak rose by {peak_bytes / 1e6:.0f} MB")
    assert total_bytes > 1_400_000_000
    assert peak_bytes < 150_000_000, "an expert has 184 MB, the only layer 1,475 MB"


def test_told_to_end_it_leaves_nothing(tmp_path: Path) -> None:
    large = [*MAKE, str(tmp_path / "checkpoint"), "--intermediate", "40000"]
    with subprocess.Popen(large, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        partial = tmp_path / ".checkpoint.partial"
        until(lambda: partial.is_dir() and any(path.stat().st_size for path in partial.iterdir()), "its beginning")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())
