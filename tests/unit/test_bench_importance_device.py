"""One device in virtual time: what is a hit, what is loaded when, what leaves, and how long a layer takes, by hand."""

from typing import Any

import pytest

from odmoe_server.bench.importance.device import Device, Features, Times
from odmoe_server.importance.substitution import Choice

# A layer's own second, ten for a load, a tenth for an expert on the device, twenty on the host.
TIMES = Times(main_s=1.0, expert_s=0.1, load_s=10.0, host_s=20.0)
NO_SCORES = [0.0] * 4


def a_device(*, slots: int, times: Times = TIMES, layers: int = 2, **features: Any) -> Device:
    return Device(num_layers=layers, num_experts=4, slots=slots, features=Features(**features), times=times)


def a_layer(device: Device, layer: int, experts: dict[int, float], scores: list[float] | None = None) -> list[int]:
    """The layer's gate speaks and its experts are computed; what was in slots before."""
    held = sorted(device.gate(layer, scores or NO_SCORES))
    device.serve(layer, experts)
    return held


def test_loads_come_one_after_the_other_and_are_computed_as_they_come() -> None:
    device = a_device(slots=4)

    a_layer(device, 0, {0: 0.6, 1: 0.4})
    assert device.counts.seconds == pytest.approx(1 + 10 + 10 + 0.1)  # the first is computed beside the second's load
    a_layer(device, 0, {0: 0.6, 1: 0.4})

    assert device.counts.seconds == pytest.approx(21.1 + 1 + 0.2)
    assert (device.counts.needed, device.counts.hits, device.counts.loads, device.counts.steps) == (4, 2, 2, 2)


def test_lru_lets_the_one_go_that_was_used_longest_ago() -> None:
    device = a_device(slots=2)
    a_layer(device, 0, {0: 1.0})
    a_layer(device, 0, {1: 1.0})
    a_layer(device, 0, {0: 1.0})

    a_layer(device, 0, {2: 1.0})

    assert sorted(device.gate(0, NO_SCORES)) == [0, 2]


def test_the_least_mean_score_goes_whether_it_was_chosen_or_not() -> None:
    device = a_device(slots=2, eviction="score", window=2)
    a_layer(device, 0, {0: 1.0}, [0.5, 0.1, 0.3, 0.1])
    a_layer(device, 0, {1: 1.0}, [0.5, 0.1, 0.3, 0.1])  # used last, and the less

    a_layer(device, 0, {2: 1.0}, [0.5, 0.1, 0.3, 0.1])

    assert sorted(device.gate(0, NO_SCORES)) == [0, 2]


def test_experts_of_the_layer_at_work_stay_and_what_finds_no_slot_is_used_and_gone() -> None:
    device = a_device(slots=2, eviction="score")

    a_layer(device, 0, {0: 0.1, 1: 0.9, 2: 0.5})

    assert sorted(device.gate(0, NO_SCORES)) == [1, 2]  # the best were loaded first, and none makes room for another
    assert device.counts.loads == 3


def test_a_prompt_fills_slots_and_counts_for_nothing() -> None:
    device = a_device(slots=4)
    device.gate(0, NO_SCORES, is_prompt=True)
    device.serve(0, {0: 1.0, 3: 1.0})
    device.replaced(chosen=2, replaced=0)

    assert (device.counts.needed, device.counts.seconds, device.counts.steps, device.counts.chosen) == (0, 0, 0, 0)
    assert a_layer(device, 0, {0: 1.0}) == [0, 3]
    assert device.counts.hits == 1


def test_the_host_takes_the_least_scored_when_the_link_is_behind() -> None:
    device = a_device(slots=4, host=True)

    a_layer(device, 0, {0: 0.5, 1: 0.3, 2: 0.2})

    # 0 over the link; then the host is idle and takes 2; then the link is done first and takes 1.
    assert (device.counts.on_host, device.counts.loads) == (1, 2)
    assert device.counts.seconds == pytest.approx(1 + 20.1)
    assert sorted(device.gate(0, NO_SCORES)) == [0, 1]


def choice(experts: tuple[int, ...], scores: list[float], alpha: float) -> Choice:
    return Choice(experts=experts, scores=scores, weights=scores, alpha=alpha)


def fetched_ahead(*, main_s: float, needed: int) -> Device:
    """Layer 0 needs expert 0, which is there; expert 2 of layer 1 is foreseen, `needed` is what its gate wants."""
    times = Times(main_s=main_s, expert_s=0.1, load_s=10.0, host_s=20.0)
    device = a_device(slots=4, times=times, eviction="score", prefetch=True)
    device.gate(0, NO_SCORES, is_prompt=True)
    device.serve(0, {0: 1.0})
    device.gate(0, NO_SCORES)
    device.serve(0, {0: 1.0})
    device.foresee(1, [choice((2,), [0.1, 0.2, 0.6, 0.1], 0.3)])
    a_layer(device, 1, {needed: 1.0})
    return device


def test_what_was_fetched_ahead_in_time_is_a_hit() -> None:
    device = fetched_ahead(main_s=12.0, needed=2)

    assert (device.counts.hits, device.counts.loads, device.counts.prefetches) == (2, 1, 1)
    assert device.counts.seconds == pytest.approx(12.1 + 12.1)


def test_what_is_still_on_its_way_is_waited_for_and_is_no_hit() -> None:
    device = fetched_ahead(main_s=4.0, needed=2)

    # Begun when layer 0's gate spoke (4.0), there 10 later; layer 1's gate speaks at 8.1.
    assert (device.counts.hits, device.counts.loads) == (1, 1)
    assert device.counts.seconds == pytest.approx(4 + 10 + 0.1)


def test_what_nobody_wants_is_broken_off_and_gives_slot_and_link_back() -> None:
    device = fetched_ahead(main_s=4.0, needed=3)

    # Of the foreseen load 4.1 of 10 seconds were spent; the other begins at once.
    assert device.counts.loads == pytest.approx(1 + 0.41)
    assert device.counts.seconds == pytest.approx(8.1 + 10 + 0.1)
    assert sorted(device.gate(1, NO_SCORES)) == [3]


@pytest.mark.parametrize(("only_top", "fetched"), [(True, 0), (False, 1)])
def test_low_score_experts_that_nothing_could_replace_are_fetched_unless_top_ones_only(
    only_top: bool, fetched: int
) -> None:
    device = a_device(slots=4, eviction="score", prefetch=True, only_top=only_top)
    device.gate(0, NO_SCORES)
    device.serve(0, {0: 1.0})
    device.foresee(1, [choice((2,), [0.1, 0.35, 0.4, 0.15], 0.3)])  # 0.4 is below 1.3 times 0.35

    assert list(device.gate(1, NO_SCORES)) == [2] * fetched
    assert device.counts.prefetches == fetched


@pytest.mark.parametrize("lacked", [True, False])
def test_as_coded_one_expert_is_fetched_and_only_behind_a_miss(lacked: bool) -> None:
    times = Times(main_s=100.0, expert_s=0.1, load_s=10.0, host_s=20.0)
    device = a_device(slots=4, times=times, eviction="score", prefetch=True, fetches_one=True)
    if not lacked:
        a_layer(device, 0, {0: 1.0})
    a_layer(device, 0, {0: 1.0})
    device.foresee(1, [choice((2, 3), [0.1, 0.1, 0.5, 0.4], 0.3)])

    assert list(device.gate(1, NO_SCORES)) == ([2] if lacked else [])
