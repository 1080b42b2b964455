"""`odmoe serve --timeline --trace`: both files are whole when a signal has ended it."""

import signal
from pathlib import Path

import pytest

from odmoe_model.trace import TraceReader
from support.drawn import read, slices_of
from support.serve_process import chat_checkpoint, serving

pytestmark = pytest.mark.slow
NUM_TOKENS = 12


def test_recordings_survive_a_signal(tmp_path: Path) -> None:
    timeline, trace = tmp_path / "timeline.json", tmp_path / "trace.jsonl"
    # Without guesses a step is a token.
    options = ["--timeline", str(timeline), "--trace", str(trace), "--draft", "0"]
    with serving(chat_checkpoint(tmp_path / "checkpoint"), tmp_path, *options) as server:
        answer = server.answer(max_tokens=NUM_TOKENS).json()
        num_tokens = answer["usage"]["completion_tokens"]
        assert num_tokens > 1
        assert server.end(signal.SIGTERM) == 0
    document = read(timeline)
    steps = [piece for piece in slices_of(document["traceEvents"]) if piece.row == "step"]
    assert len(steps) == num_tokens
    assert document["otherData"]["decode_totals"]["tokens"] == num_tokens - 1
    assert document["otherData"]["marks_dropped"] == 0
    assert len(list(TraceReader.open(trace).steps())) == num_tokens - 1
