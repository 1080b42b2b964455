"""Supervision of child processes, with processes that die when a test says so and a clock that a test moves."""

import signal
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from odmoe_server.children import KILL_AFTER_S, MAX_BACKOFF_S, MAX_FAILURES, SETTLED_S, ChildSpec, Supervisor, how


@dataclass
class FakeProcess:
    """Ends when it gets a signal out of `obeys`, or when `status` is set."""

    obeys: tuple[int, ...] = (signal.SIGTERM, signal.SIGKILL)
    status: int | None = None
    signals: list[int] = field(default_factory=list)

    def poll(self) -> int | None:
        return self.status

    def send_signal(self, sig: int) -> None:
        self.signals.append(sig)
        if sig in self.obeys:
            self.status = -sig


@dataclass
class Nursery:
    """Starts fake processes and remembers them."""

    obeys: tuple[int, ...] = (signal.SIGTERM, signal.SIGKILL)
    born: list[tuple[str, FakeProcess]] = field(default_factory=list)

    def spawn(self, spec: ChildSpec) -> FakeProcess:
        process = FakeProcess(obeys=self.obeys)
        self.born.append((spec.name, process))
        return process

    def names(self) -> list[str]:
        return [name for name, _ in self.born]


def spec(name: str, **options: object) -> ChildSpec:
    return ChildSpec(name=name, command=(name,), environment={}, **options)  # type: ignore[arg-type]


def supervisor(nursery: Nursery, *specs: ChildSpec) -> Supervisor:
    return Supervisor(specs=specs, spawn=nursery.spawn)


def test_all_are_started_once() -> None:
    nursery = Nursery()
    family = supervisor(nursery, spec("a"), spec("b"))
    family.tick(0)
    family.tick(1)
    assert nursery.names() == ["a", "b"]


def test_who_dies_is_started_again_after_a_pause() -> None:
    nursery = Nursery()
    family = supervisor(nursery, spec("a"), spec("b"))
    family.tick(0)
    nursery.born[1][1].status = 1
    family.tick(10)
    family.tick(10.4)
    assert nursery.names() == ["a", "b"]
    family.tick(10.5)
    assert nursery.names() == ["a", "b", "b"]


def deaths(nursery: Nursery, family: Supervisor, *, lives_s: float) -> list[float]:
    """The pauses between death and birth of a child that always dies."""
    pauses, now_s = [], 0.0
    family.tick(now_s)
    while not family.given_up() and len(pauses) < 20:
        now_s += lives_s
        nursery.born[-1][1].status = 1
        family.tick(now_s)
        died_s, births = now_s, len(nursery.born)
        while len(nursery.born) == births and not family.given_up():
            now_s += 0.5
            family.tick(now_s)
        pauses.append(now_s - died_s)
    return pauses


def test_pauses_grow_and_in_the_end_it_is_given_up() -> None:
    nursery = Nursery()
    family = supervisor(nursery, spec("a"))
    pauses = deaths(nursery, family, lives_s=1)
    assert len(pauses) == MAX_FAILURES
    assert pauses[:-1] == sorted(pauses[:-1])
    assert max(pauses) <= MAX_BACKOFF_S
    assert family.given_up() == ["a"]
    assert len(nursery.born) == MAX_FAILURES


def test_a_usage_error_is_not_repeated() -> None:
    nursery = Nursery()
    family = supervisor(nursery, spec("a"))
    family.tick(0)
    nursery.born[0][1].status = 2
    family.tick(100)
    assert family.given_up() == ["a"]
    assert len(nursery.born) == 1


def test_who_lived_long_is_never_given_up() -> None:
    nursery = Nursery()
    family = supervisor(nursery, spec("a"))
    assert set(deaths(nursery, family, lives_s=SETTLED_S)) == {0.5}
    assert family.given_up() == []


class Clock:
    """Time that passes only while somebody naps."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.at_each_nap: Callable[[], None] = lambda: None

    def __call__(self) -> float:
        return self.now_s

    def nap(self, seconds: float) -> None:
        self.now_s += seconds
        self.at_each_nap()


def stop(family: Supervisor, clock: Clock, *, hurry: Callable[[], bool] = lambda: False) -> None:
    family.stop(hurry=hurry, clock=clock, nap=clock.nap)


def test_who_goes_first_has_gone_before_the_others_are_asked() -> None:
    nursery, clock = Nursery(obeys=(signal.SIGKILL,)), Clock()
    family = supervisor(nursery, spec("node"), spec("server", stops_first=True, stop_s=30.0))
    family.tick(0)
    node, server = (process for _, process in nursery.born)

    def drained() -> None:
        if clock.now_s > 20 and server.status is None:
            assert server.signals == [signal.SIGTERM]
            assert node.signals == []
            server.status = 0

    clock.at_each_nap = drained
    stop(family, clock)
    assert server.signals == [signal.SIGTERM]
    assert node.signals == [signal.SIGTERM, signal.SIGKILL]


def test_who_does_not_end_is_killed_in_bounded_time() -> None:
    nursery, clock = Nursery(obeys=()), Clock()
    family = supervisor(nursery, spec("a"), spec("b"), spec("server", stops_first=True, stop_s=3.0))
    family.tick(0)
    stop(family, clock)
    assert all(process.signals == [signal.SIGTERM, signal.SIGKILL] for _, process in nursery.born)
    assert clock.now_s < 3 + 3 * KILL_AFTER_S + 1


def test_a_hurry_kills_at_once() -> None:
    nursery, clock = Nursery(obeys=(signal.SIGKILL,)), Clock()
    family = supervisor(nursery, spec("a"), spec("b"))
    family.tick(0)
    stop(family, clock, hurry=lambda: True)
    assert clock.now_s < 1
    assert all(process.signals[-1] == signal.SIGKILL for _, process in nursery.born)


def test_the_dead_are_not_signalled() -> None:
    nursery, clock = Nursery(), Clock()
    family = supervisor(nursery, spec("a"))
    family.tick(0)
    nursery.born[0][1].status = 1
    family.tick(1)
    stop(family, clock)
    assert nursery.born[0][1].signals == []


@pytest.mark.parametrize(("status", "words"), [(3, "status 3"), (-9, "signal SIGKILL")])
def test_a_status_in_words(status: int, words: str) -> None:
    assert how(status) == words
