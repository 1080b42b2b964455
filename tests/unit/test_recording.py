"""Recorders make nobody wait: bounded, counted, ended by a disk that fails. And the settings that switch them on."""

import logging
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest

from odmoe_server import listening
from odmoe_server.config import ServerSettings, ServeSettings
from odmoe_server.engine.recordings import Recordings
from odmoe_server.launch_plan import Plan, children
from odmoe_server.recording import CappedFile, Recorder
from odmoe_server.serving import engine_options
from odmoe_wire.settings import load


class Sink:
    """Keeps what it is given, until it breaks."""

    def __init__(self) -> None:
        self.items: list[int] = []
        self.dropped = 0
        self.broken = self.closed = False

    def write(self, items: Sequence[int], dropped: int) -> None:
        if self.broken:
            raise OSError("no space left on device")
        self.items += items
        self.dropped += dropped

    def close(self) -> None:
        self.closed = True


def test_items_come_in_order() -> None:
    sink = Sink()
    recorder = Recorder(sink, name="it")
    recorder.put(1)
    recorder.put(2)
    assert sink.items == [], "nothing is written where things happen"
    recorder.flush()
    recorder.put(3)
    recorder.close()
    assert (sink.items, sink.closed) == ([1, 2, 3], True)


def test_what_there_is_no_room_for_is_dropped_and_counted() -> None:
    sink = Sink()
    recorder = Recorder(sink, name="it", max_waiting=2)
    for number in range(5):
        recorder.put(number)
    recorder.flush()
    recorder.put(5)
    recorder.flush()
    assert (sink.items, sink.dropped) == ([0, 1, 5], 3)


def test_a_disk_that_fails_ends_the_recording_only(caplog: pytest.LogCaptureFixture) -> None:
    sink = Sink()
    recorder = Recorder(sink, name="the trace t", max_waiting=2)
    sink.broken = True
    recorder.put(1)
    with caplog.at_level(logging.ERROR):
        recorder.flush()
    assert "the trace t cannot be written" in caplog.text
    sink.broken = False
    recorder.put(2)
    recorder.close()
    assert sink.items == []


def test_a_thread_writes_what_is_left_at_the_end() -> None:
    sink = Sink()
    recorder = Recorder(sink, name="it")
    recorder.start()
    recorder.put(1)
    recorder.close()
    assert (sink.items, sink.closed) == ([1], True)


def test_a_capped_file_never_rotates_what_it_has_not(tmp_path: Path) -> None:
    """One append that is larger than the cap must not leave an empty file behind each time."""
    file = CappedFile(tmp_path / "f", cap_bytes=4, head=lambda: b"h")
    file.append(b"larger")
    assert (tmp_path / "f").read_bytes() == b"hlarger"
    assert not file.previous.exists()
    file.append(b"x")
    file.close()
    assert ((tmp_path / "f").read_bytes(), file.previous.read_bytes()) == (b"hx", b"hlarger")


def test_a_tail_gives_way(tmp_path: Path) -> None:
    file = CappedFile(tmp_path / "f", cap_bytes=100, head=lambda: b"[")
    file.append(b"1", tail=b" and a long tail]")
    file.append(b",2", tail=b"]")
    file.close()
    assert (tmp_path / "f").read_bytes() == b"[1,2]"


@pytest.mark.parametrize("kind", [ServerSettings, ServeSettings])
def test_both_commands_have_both_settings(kind: type[ServerSettings] | type[ServeSettings]) -> None:
    assert (kind().timeline, kind().trace) == (None, None)
    settings = load(kind, ["--timeline", "a.json", "--trace", "b.jsonl"], prog="x")
    assert (settings.timeline, settings.trace) == (Path("a.json"), Path("b.jsonl"))


def test_the_settings_reach_the_engine() -> None:
    options = engine_options(ServerSettings(timeline=Path("a.json"), trace=Path("b.jsonl")))
    assert (options.timeline, options.trace) == (Path("a.json"), Path("b.jsonl"))


def test_serve_hands_them_to_its_server(tmp_path: Path) -> None:
    with listening.bind("127.0.0.1", 0) as listener:
        server = children(plan_of(tmp_path, listener))[0]
    got = load(ServerSettings, list(server.command[4:]), prog="x")
    assert (got.timeline, got.trace) == (tmp_path / "a.json", tmp_path / "b.jsonl")


def plan_of(tmp_path: Path, listener: socket.socket) -> Plan:
    settings = ServeSettings(timeline=tmp_path / "a.json", trace=tmp_path / "b.jsonl")
    return Plan(settings=settings, store=tmp_path, top_k=2, runtime=tmp_path, listener=listener, cores=2)


def test_one_file_for_both_is_refused(tmp_path: Path) -> None:
    same = tmp_path / "same"
    with pytest.raises(ValueError, match="each a file of its own"):
        Recordings.open(None, timeline_file=same, trace_file=same)  # type: ignore[arg-type]
    assert not same.exists()
