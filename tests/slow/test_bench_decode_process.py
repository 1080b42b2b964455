"""A miniature of `odmoe bench decode`, for real: all processes, a tiny checkpoint, the record."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from odmoe_model.prepare import prepare
from odmoe_model.random_checkpoint import RandomCheckpoint
from odmoe_model.random_shape import RandomShape

pytest.importorskip("matplotlib")
# Some twenty seconds of work; many times that where others work too.
DEADLINE_S = 540.0
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SHAPE = RandomShape(family="mixtral", layers=3, hidden=64, intermediate=96, vocab=400, context=512)
ASKED = ["--nodes", "2", "--variants", "on-demand,no-predictor", "--link-ratio", "2", "--repeats", "1", "--no-parts"]
TOKENS = 6


def test_a_small_run_gives_a_record_with_answers_equal_to_transformers(tmp_path: Path) -> None:
    RandomCheckpoint(SHAPE).write(tmp_path / "checkpoint")
    prepare(tmp_path / "checkpoint", tmp_path / "store")
    asked = ["--model", str(tmp_path / "store"), *ASKED, "--tokens", str(TOKENS), "--first-prompt-tokens", "20"]
    asked += ["--out", str(tmp_path / "out"), "--json", str(tmp_path / "found.json")]
    command = [sys.executable, "-m", "odmoe_server", "bench", "decode", *asked]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "found.json").read_text("utf-8"))
    _, on_demand, no_predictor = record["rows"]
    assert [row["variant"] for row in record["rows"]] == ["resident", "on-demand", "no-predictor"]
    assert all(row["identical"] for row in record["rows"])
    assert all(row["tokens"] == TOKENS - 1 and row["link_ratio"] == 2 for row in (on_demand, no_predictor))
    assert on_demand["recall"] > 0.5 > no_predictor["recall"] == 0
    assert on_demand["predictor_bytes"] > 0 == no_predictor["predictor_bytes"]
    assert on_demand["node_bytes"] == record["shape"]["expert_bytes"]
    # Give or take what a prompt loads in vain; a load is done again where a node was late.
    assert no_predictor["loads"] >= 0.8 * (TOKENS - 1) * 3 * 2
    assert no_predictor["stall_share"] > 0
    assert no_predictor["device_bytes_ratio"] < on_demand["device_bytes_ratio"]
    assert record["main_s"] > 0 < record["expert_s"]
    assert record["load_s"]["2"] == pytest.approx(2 * record["layer_s"])
    assert {one["implementation"] for one in record["resident"]["before"]} == {"eager", "batched_mm", "grouped_mm"}
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".md", ".json", ".png"}
