"""Rows of an importance record, likeness of experts, right answers, and the arms: worked out by hand."""

import math

import pytest
import torch

from odmoe_server.bench.importance.arms import ABLATION, ALPHAS, GOAL_SHARE, IMPORTANCE, LRU, SHARES, arms
from odmoe_server.bench.importance.device import Counts
from odmoe_server.bench.importance.fleet import Arm
from odmoe_server.bench.importance.likeness import add_distances, by_distance
from odmoe_server.bench.importance.questions import QUESTIONS, Question, is_right
from odmoe_server.bench.importance.rows import add_quality, compare, replayed_row
from odmoe_server.bench.importance.texts import TEXTS

COUNTS = Counts(
    needed=40, hits=30, on_host=4, loads=6.5, prefetches=2, chosen=60, replaced=15, seconds=0.5, steps=10
)  # fmt: skip


def an_arm(policy: str, *, batch: int = 3, alpha: float = 0.0, share: float = 0.25) -> Arm:
    return Arm(policy=policy, slots_share=share, batch=batch, alpha=alpha, features=ABLATION[policy])


def test_a_row_says_what_was_counted() -> None:
    row = replayed_row("m", an_arm(IMPORTANCE, alpha=0.3), COUNTS, record_bytes=100, num_experts=80)

    assert (row.hit_rate, row.host_share, row.substituted, row.slots) == (0.75, 0.1, 0.25, 20)
    assert row.bytes_per_token == pytest.approx(6.5 * 100 / 30)  # ten steps of three tokens
    assert row.tpot_computed_ms == pytest.approx(50)
    assert row.tpot_ms is None  # nothing was served


def test_times_are_compared_with_lru_of_the_same_slots_and_batch() -> None:
    def row(policy: str, seconds: float, *, batch: int) -> None:
        counts = Counts(needed=1, chosen=1, seconds=seconds, steps=1)
        rows.append(replayed_row("m", an_arm(policy, batch=batch), counts, record_bytes=1, num_experts=8))

    rows: list = []  # type: ignore[type-arg]
    row(LRU, 2.0, batch=1)
    row(LRU, 8.0, batch=3)
    row(IMPORTANCE, 1.5, batch=1)
    row(IMPORTANCE, 2.0, batch=3)

    compare(rows)

    assert [one.tpot_computed_vs_lru for one in rows] == [0.0, 0.0, -0.25, -0.75]
    assert all(one.tpot_vs_lru is None for one in rows)


def test_quality_is_that_of_the_same_tokens() -> None:
    row = replayed_row("m", an_arm(IMPORTANCE), COUNTS, record_bytes=1, num_experts=8)

    add_quality(row, [1.0, 2.0, 3.0, 2.4], [1.0, 1.8, 3.2, 2.0], agreed=3)

    assert row.perplexity == pytest.approx(math.exp(2.1))
    assert row.perplexity_vs_gated == pytest.approx(math.exp(0.1) - 1)
    # Gaps 0, 0.2, -0.2, 0.4 have a mean of 0.1 and a deviation of sqrt(0.2 / 3).
    error = 1.96 * math.sqrt(0.2 / 3 / 4)
    assert row.perplexity_low == pytest.approx(math.exp(0.1 - error) - 1)
    assert row.perplexity_high == pytest.approx(math.exp(0.1 + error) - 1)
    assert row.agreement == 0.75


def test_likeness_counts_the_rows_that_were_sent_to_the_replaced_expert() -> None:
    distance_EE, rows_E = torch.zeros(3, 3), torch.zeros(3)
    outputs_ETH = torch.tensor([[[2.0, 0.0], [9.0, 9.0]], [[1.0, 0.0], [0.0, 1.0]], [[2.0, 1.0], [0.0, 3.0]]])

    add_distances(distance_EE, rows_E, outputs_ETH, torch.tensor([[0], [1]]))

    assert rows_E.tolist() == [1, 1, 0]
    assert distance_EE[0].tolist() == [0.0, 0.25, 0.25]  # of row 0 alone: 1 / 4 and 1 / 4
    assert distance_EE[1].tolist() == [145.0, 0.0, 4.0]  # of row 1: (81 + 64) / 1 and 4 / 1
    likeness = by_distance(distance_EE[None])
    assert likeness(0, 1, 2) > likeness(0, 1, 0)


def test_the_arms_are_those_of_the_issue() -> None:
    found = arms(batches=(1, 3), quick=False, like=lambda layer, old, new: 0.0)

    assert len(found) == len(set(found))
    assert {(arm.slots_share, arm.batch) for arm in found} == {(share, batch) for share in SHARES for batch in (1, 3)}
    whole = {arm.alpha for arm in found if arm.policy == IMPORTANCE and arm.slots_share == GOAL_SHARE}
    assert whole == {0.0, *ALPHAS}
    assert {arm.policy for arm in found} > set(ABLATION)
    assert len(arms(batches=(1, 3), quick=True, like=None)) < len(found) / 3


def test_answers_are_right_by_whole_words() -> None:
    seven = Question("How many days has a week?", ("7", "seven"))

    assert is_right(seven, "A week has Seven days.")
    assert is_right(seven, "7")
    assert not is_right(seven, "There are 17 or 70.")


def test_texts_and_questions_are_what_the_record_says() -> None:
    assert len(QUESTIONS) == 56
    assert len({question.text for question in QUESTIONS}) == len(QUESTIONS)
    assert len(TEXTS) == 12
