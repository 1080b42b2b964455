"""Preparing holds less than two layers of experts and the non-expert weights in memory; and survives SIGKILL.

Anonymous memory is what counts: mapped pages of the checkpoint are the kernel's to take back at any time. So that
it shows what is held, glibc is told to give freed blocks back at once; left alone it keeps up to 70 MiB of them,
whatever the size of the model.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from odmoe_model.manifest import read_manifest
from odmoe_model.store import ExpertStore
from support.tiny import tiny_checkpoint

# Threads, allocator, headers, and the objects of the conversion.
OVERHEAD_BYTES = 12 << 20
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 18)}
WATCHED = """
import sys, threading
from pathlib import Path
from odmoe_model.prepare import prepare

def anonymous_bytes():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024

def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous_bytes())

warm, source, destination = map(Path, sys.argv[1:])
prepare(warm, destination.with_name("warm"))
before, peak, done = anonymous_bytes(), [0], threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
prepare(source, destination)
done.set()
watcher.join()
print(peak[0] - before)
"""
KILLED_IN_LAYER_2 = """
import os, signal, sys
from pathlib import Path
from odmoe_model.prepare import prepare

def kill(what, done_bytes, total_bytes):
    if what.startswith("layer 2"):
        os.kill(os.getpid(), signal.SIGKILL)

prepare(Path(sys.argv[1]), Path(sys.argv[2]), progress=kill)
"""
UNHURT = """
import sys
from pathlib import Path
from odmoe_model.prepare import prepare

prepare(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def python(script: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, check=False, env={**os.environ, **ALLOCATOR}
    )


@pytest.mark.slow
@pytest.mark.parametrize("cast", [False, True], ids=["as it is", "fp32 to bf16"])
def test_peak_memory(tmp_path: Path, cast: bool):
    warm = tiny_checkpoint("mixtral", tmp_path / "warm-checkpoint")
    source = tiny_checkpoint("mixtral", tmp_path / "checkpoint", num_hidden_layers=3, intermediate_size=20_000)
    if cast:
        for config in (warm / "config.json", source / "config.json"):
            config.write_text(config.read_text().replace('"float32"', '"bfloat16"'))
    run = python(WATCHED, warm, source, tmp_path / "store")
    assert run.returncode == 0, run.stderr
    peak_bytes = int(run.stdout)
    manifest = read_manifest(tmp_path / "store")
    layer_bytes = manifest.num_experts * manifest.record_bytes
    print(f"peak {peak_bytes / 2**20:.1f} MiB over the start, a layer has {layer_bytes / 2**20:.1f} MiB")
    assert peak_bytes < 2 * layer_bytes + manifest.non_expert.bytes + OVERHEAD_BYTES
    assert layer_bytes > 4 * OVERHEAD_BYTES, "too small to tell"


@pytest.mark.slow
def test_killed_run_leaves_no_store_and_the_next_cleans_up(tmp_path: Path):
    source = tiny_checkpoint("mixtral", tmp_path / "checkpoint")
    destination = tmp_path / "cache" / "store"
    assert python(KILLED_IN_LAYER_2, source, destination).returncode == -signal.SIGKILL
    assert not destination.exists()
    run = python(UNHURT, source, destination)
    assert run.returncode == 0, run.stderr
    assert [entry.name for entry in destination.parent.iterdir()] == ["store"]
    ExpertStore.open(destination, verify=True)
