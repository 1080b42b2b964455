"""The pure parts of the chaos campaign: what is one message, which faults come, what they come to."""

import asyncio
import random
import threading
from pathlib import Path

import pytest

from chaos.faults import KINDS, SERVER_GOES_WITHIN, Fault, draw
from chaos.ledger import Asked, Happened, Ledger, percentile
from chaos.roles import Process
from chaos.zmtp import GREETING_BYTES, Chunk, Splitter

GREETING = bytes(GREETING_BYTES)
READY = b"\x04\x05READY"
TWO_FRAMES = b"\x01\x02ab\x00\x01c"
LONG = b"\x02" + (300).to_bytes(8, "big") + bytes(300)


@pytest.mark.parametrize("seed", range(5))
def test_messages_are_found_however_the_stream_is_cut(seed: int) -> None:
    dice = random.Random(seed)
    stream = GREETING + READY + TWO_FRAMES + LONG + TWO_FRAMES
    splitter, chunks = Splitter(), []
    while stream:
        size = dice.randint(1, 90)
        chunks += splitter.feed(stream[:size])
        stream = stream[size:]
    greeting = [chunk for chunk in chunks if chunk.data.strip(b"\0") == b"" and not chunk.is_message]
    assert b"".join(chunk.data for chunk in greeting) == GREETING
    assert chunks[len(greeting) :] == [
        Chunk(READY, is_message=False),
        Chunk(TWO_FRAMES, is_message=True),
        Chunk(LONG, is_message=True),
        Chunk(TWO_FRAMES, is_message=True),
    ]


def test_every_kind_befalls_every_role_and_the_server_goes_early_only() -> None:
    faults = draw(seed=1, count=200, nodes=["node-0", "node-1"], pace_s=1.0)
    assert faults == draw(seed=1, count=200, nodes=["node-0", "node-1"], pace_s=1.0)
    assert faults != draw(seed=2, count=200, nodes=["node-0", "node-1"], pace_s=1.0)
    assert {(fault.role, fault.kind) for fault in faults} == {
        (role, kind) for role in ("node", "predictor", "server") for kind in KINDS
    }
    goes = [fault.number for fault in faults if fault.role == "server" and fault.kind in ("kill", "restart")]
    assert max(goes) <= SERVER_GOES_WITHIN * 200


def happened(role: str, kind: str, began_s: float, ended_s: float) -> Happened:
    fault = Fault(number=0, kind=kind, role=role, target=role, hold_s=1.0, wait_s=0.0)  # type: ignore[arg-type]
    return Happened(fault=fault, began_s=began_s, ended_s=ended_s)


def test_recovery_is_the_longest_silence_that_touches_the_fault() -> None:
    node, server = happened("node", "pause", 10.0, 12.0), happened("server", "kill", 20.0, 21.0)
    ledger = Ledger(happened=[node, server], token_s=[1.0, 9.9, 10.6, 12.5, 12.6, 19.9, 23.0, 23.1])
    assert ledger.recovery_s(node) == pytest.approx(7.3), "12.6 to 19.9 begins within the aftermath"
    assert ledger.recovery_s(server) == pytest.approx(2.0), "from when it runs again"
    (longest,) = ledger.silences(longer_than_s=8.0)
    assert (longest["at_s"], longest["silence_s"]) == (0.0, 8.9)


def test_a_silence_that_begins_with_a_fault_of_the_server_is_no_other_faults() -> None:
    """A token that was on its way may come when the server has been stopped already."""
    node, server = happened("node", "drop", 10.0, 11.0), happened("server", "pause", 11.5, 15.0)
    ledger = Ledger(happened=[node, server], token_s=[10.0, 10.4, 11.49, 11.51, 15.1, 15.2])
    assert ledger.recovery_s(node) == pytest.approx(1.09)
    assert ledger.recovery_s(server) == pytest.approx(0.1)


def test_a_failure_counts_unless_the_server_itself_was_gone() -> None:
    asked = [
        Asked(began_s=0.0, ended_s=1.0, outcome="right"),
        Asked(began_s=2.0, ended_s=3.0, outcome="failed", detail="x"),
        Asked(began_s=19.0, ended_s=20.5, outcome="failed"),
        Asked(began_s=21.0, ended_s=21.0, outcome="refused"),
        Asked(began_s=5.0, ended_s=6.0, outcome="wrong"),
    ]
    ledger = Ledger(happened=[happened("server", "kill", 20.0, 21.0)], asked=asked)
    assert [one.detail for one in ledger.failed()] == ["x"]
    found = ledger.summary()
    assert (found["requests"], found["failed_requests"], found["ended_with_the_server"]) == (4, 1, 1)
    assert (found["wrong_answers"], found["refused_and_tried_again"]) == (1, 1)


def test_memory_is_that_of_the_longest_life() -> None:
    samples = [(0.0, 1, 999_000_000)] + [(float(i), 2, (300 + i) * 1_000_000) for i in range(8)]
    assert Ledger(server_memory=samples).memory() == {
        "server_mb_early": 302.5,
        "server_mb_late": 306.5,
        "server_mb_most": 307.0,
    }


def test_percentiles() -> None:
    assert percentile([], 50) is None
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile([float(i) for i in range(1, 201)], 99) == 198.0


def test_a_process_has_joined_when_its_present_life_was_welcomed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told to end before that, it would die of the signal: its handlers come with its first words."""
    monkeypatch.setattr("chaos.roles._context.Process", lambda **_: Living(polls=0))
    process = Process("node-0", "node", [], tmp_path / "node-0.log")
    process.start()
    assert not process.has_joined
    process.log.write_text("node-0 is connected to the server\n")
    assert process.has_joined
    process.start()
    assert not process.has_joined, "that was its former life"
    with process.log.open("a") as log:
        log.write("node-0 is connected to the server\n")
    assert process.has_joined


class Living:
    """A process that is over after so many looks, and must be looked at from one thread only."""

    def __init__(self, *, polls: int) -> None:
        self._left, self.threads = polls, set[int]()

    def start(self) -> None:
        pass

    def is_alive(self) -> bool:
        self.threads.add(threading.get_ident())
        self._left -= 1
        return self._left >= 0


def test_the_end_of_a_process_is_awaited_on_the_loops_own_thread(tmp_path: Path) -> None:
    process = Process("node-0", "node", [], tmp_path / "node-0.log")
    process._now = living = Living(polls=3)  # type: ignore[assignment]
    asyncio.run(process.ended())
    assert living.threads == {threading.get_ident()}
