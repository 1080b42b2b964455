"""How long a compute may take: little where answers come evenly, more where they stray. Pure, no sleep."""

import pytest

from odmoe_server.cluster.lateness import HALF_LIFE_S, LATE_FACTOR, LOADS, Lateness

LEAST_S, MOST_S = 0.1, 0.5


@pytest.fixture
def lateness() -> Lateness:
    return Lateness(least_s=LEAST_S, most_s=MOST_S, cap_s=30.0)


def answer(lateness: Lateness, node_id: str, took_s: float, *, now: float) -> None:
    lateness.answered(node_id, took_s=took_s, expected_s=0.005, now=now)


def test_before_anything_is_known_it_waits_long(lateness: Lateness) -> None:
    assert lateness.late_after_s(2, 2, tries=0, now=0.0) == MOST_S


def test_where_answers_come_evenly_it_waits_little(lateness: Lateness) -> None:
    for node_id in ("a", "b"):
        answer(lateness, node_id, 0.006, now=1.0)
    assert lateness.quiet_s(1.0) == LEAST_S


def test_a_machine_that_stands_still_now_and_then_is_waited_for_and_that_is_forgotten(lateness: Lateness) -> None:
    for node_id in ("a", "b", "c"):
        answer(lateness, node_id, 0.155, now=1.0)
        answer(lateness, node_id, 0.005, now=1.1)
    assert lateness.quiet_s(1.1) == pytest.approx(0.3, rel=0.03)
    assert lateness.quiet_s(1.0 + 2 * HALF_LIFE_S) == LEAST_S


def test_one_that_strays_among_others_that_do_not_changes_nothing(lateness: Lateness) -> None:
    for node_id, took_s in (("a", 0.4), ("b", 0.005)):
        answer(lateness, node_id, took_s, now=1.0)
    assert lateness.quiet_s(1.0) == LEAST_S
    lateness.forget("b")
    assert lateness.quiet_s(1.0) == MOST_S, "with itself for the only measure"


def test_however_far_all_stray_it_waits_no_longer_than_at_most_and_not_for_long(lateness: Lateness) -> None:
    for node_id in ("a", "b"):
        answer(lateness, node_id, 60.0, now=1.0)
    assert lateness.quiet_s(1.0) == MOST_S
    assert lateness.quiet_s(1.0 + 3 * HALF_LIFE_S) == LEAST_S


def test_each_further_try_waits_longer_and_none_longer_than_ever(lateness: Lateness) -> None:
    answer(lateness, "a", 0.005, now=0.0)
    waits_s = [lateness.late_after_s(1, 1, tries=tries, now=0.0) for tries in range(100)]
    assert waits_s == sorted(waits_s)
    assert waits_s[0] == LEAST_S < waits_s[1]
    assert waits_s[-1] == MOST_S


def test_much_work_and_loads_that_may_be_missing_are_allowed_for(lateness: Lateness) -> None:
    answer(lateness, "a", 0.005, now=0.0)
    lateness.learn(1, 10, compute_s=0.01, took_s=0.012)
    expected_s = lateness.expected_s(4, 40)
    assert lateness.late_after_s(4, 40, tries=0, now=0.0) == pytest.approx(LEAST_S + LATE_FACTOR * expected_s)
    lateness.loaded([0.2])
    assert lateness.late_after_s(4, 40, tries=0, now=0.0) == pytest.approx(LEAST_S + LOADS * 4 * 0.2)
    assert lateness.late_after_s(1000, 1, tries=0, now=0.0) == 30.0, "but not beyond all bounds"


def test_a_sample_that_is_far_off_counts_only_so_much(lateness: Lateness) -> None:
    for _ in range(50):
        lateness.learn(1, 1, compute_s=0.0, took_s=0.002)
    lateness.learn(1, 1, compute_s=0.0, took_s=5.0)
    assert lateness.expected_s(1, 1) < 0.005
