"""Life signs at the edge of their times."""

import pytest

from odmoe_wire.liveness import Liveness


@pytest.fixture
def liveness() -> Liveness:
    return Liveness(heartbeat_s=1.0, lost_after_s=3.0, started_s=10.0)


def test_lost_only_after_silence(liveness: Liveness) -> None:
    assert not liveness.lost(12.999)
    assert liveness.lost(13.0)
    liveness.heard(12.5)
    assert not liveness.lost(15.0)
    assert liveness.lost(15.5)


def test_silence_while_nobody_could_be_heard_is_not_the_peers(liveness: Liveness) -> None:
    liveness.excuse(2.0, 12.5)  # from 10.5 to 12.5 we stood still
    assert not liveness.lost(14.999)
    assert liveness.lost(15.0)
    for now_s in range(15, 20):  # standing still for half of the time, it takes twice as long, not for ever
        liveness.excuse(0.5, float(now_s))
    assert liveness.lost(19.0)


def test_no_more_is_excused_than_there_was(liveness: Liveness) -> None:
    liveness.excuse(9.0, 11.0)
    assert liveness.silence_s(11.0) == 0.0


def test_due_each_period_whatever_was_heard(liveness: Liveness) -> None:
    liveness.heard(10.9)
    assert not liveness.due(10.999)
    assert liveness.due(11.0)
    liveness.said(11.0)
    assert not liveness.due(11.999)
    assert liveness.due(12.0)


def test_an_older_time_changes_nothing(liveness: Liveness) -> None:
    liveness.heard(12.0)
    liveness.heard(5.0)
    liveness.said(12.0)
    liveness.said(5.0)
    assert not liveness.lost(14.9)
    assert not liveness.due(12.9)


def test_how_long_a_driver_may_sleep(liveness: Liveness) -> None:
    assert liveness.wait_s(10.25) == 0.75
    liveness.said(12.5)
    assert liveness.wait_s(12.75) == 0.25
    assert liveness.wait_s(99.0) == 0.0


@pytest.mark.parametrize(("heartbeat_s", "lost_after_s"), [(0.0, 1.0), (1.0, 1.0), (2.0, 1.0), (float("nan"), 1.0)])
def test_times_that_make_no_sense(heartbeat_s: float, lost_after_s: float) -> None:
    with pytest.raises(ValueError, match="heartbeat_s"):
        Liveness(heartbeat_s=heartbeat_s, lost_after_s=lost_after_s, started_s=0.0)
