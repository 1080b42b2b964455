"""Rows of a decode record, speeds of links, slots of the cache, and what is read off /metrics: worked out by hand."""

import dataclasses
import math
from typing import Any

import pytest

from odmoe_server.bench.pinning import Cores, choose, pinned
from odmoe_server.bench.reading import Reading, decoding, read
from odmoe_server.bench.rows import DeviceBytes, Reference, Run, resident_row, row_of
from odmoe_server.bench.variants import QUICK, VARIANTS, chosen, link_gbps, lru_slots, named
from odmoe_server.config import ServeSettings
from odmoe_server.metrics import Metrics
from support.scripted_engine import ScriptedEngine

PAGE = """
odmoe:time_to_first_token_seconds_sum{model_name="m"} 1.5
odmoe:time_to_first_token_seconds_count{model_name="m"} 2.0
odmoe:inter_token_latency_seconds_sum{model_name="m"} 4.0
odmoe:inter_token_latency_seconds_count{model_name="m"} 16.0
odmoe:expert_activations_total{model_name="m"} 64.0
odmoe:expert_activations_predicted_total{model_name="m"} 60.0
odmoe:expert_activations_predicted_late_total{model_name="m"} 2.0
odmoe:expert_predictions_total{outcome="hit"} 50.0
odmoe:expert_predictions_total{outcome="late"} 10.0
odmoe:expert_predictions_total{outcome="miss"} 4.0
odmoe:expert_stall_seconds_total{model_name="m"} 0.5
odmoe:expert_loads_total{node="node-0"} 30.0
odmoe:expert_loads_total{node="node-1"} 40.0
odmoe:expert_loads_unused_total{node="node-0"} 3.0
odmoe:expert_load_seconds_sum{node="node-0"} 1.25
odmoe:expert_load_seconds_sum{node="node-1"} 1.75
odmoe:expert_load_bytes_total{node="node-0"} 700.0
odmoe:expert_compute_seconds_total{node="node-0"} 0.75
odmoe:spec_decode_num_draft_tokens_total{model_name="m"} 8.0
odmoe:spec_decode_num_accepted_tokens_total{model_name="m"} 6.0
odmoe:shadow_realign_total{model_name="m"} 4.0
odmoe:expert_budget_bytes{node="node-1"} 200.0
odmoe:expert_budget_bytes{node="node-0"} 100.0
"""
READ = Reading(
    first_s=1.5, first_tokens=2, between_s=4, between_tokens=16, activations=64, predicted=60, predicted_late=2, hit=50,
    late=10, missed=4, stall_s=0.5, loads=70, loads_unused=3, load_s=3, load_bytes=700, compute_s=0.75,
    guesses=8, agreed=6, realigned=4, slot_bytes=(100, 200),
)  # fmt: skip
REFERENCE = Reference(tokens_per_s=8.0, first_s=0.5, device_bytes=4000)


def a_run(**changes: Any) -> Run:
    run = Run(
        variant="on-demand",
        link_ratio=4.4,
        link_gbps=0.5,
        slots=1,
        decoded=[READ],
        first_s=[1.0],
        identical=True,
        device=DeviceBytes(server=300, nodes=(100, 200), predictor=400),
    )
    return dataclasses.replace(run, **changes)


def test_a_page_of_metrics_is_summed_over_nodes() -> None:
    assert read(PAGE) == READ


def test_a_page_without_a_metric_is_refused_by_its_name() -> None:
    with pytest.raises(ValueError, match="odmoe:expert_stall_seconds_total"):
        read("\n".join(line for line in PAGE.splitlines() if "stall" not in line))


def test_the_servers_own_page_has_every_metric() -> None:
    page = Metrics(ScriptedEngine(), model_name="m").page().decode()
    assert read(page).activations == ScriptedEngine().health().totals.activations


def test_what_came_between_two_looks() -> None:
    later = dataclasses.replace(READ, between_tokens=20, loads=75, slot_bytes=(1,))
    grown = later.since(READ)
    assert (grown.between_tokens, grown.loads, grown.activations, grown.slot_bytes) == (4, 5, 0, (1,))


def test_decoding_is_the_request_less_the_loads_of_its_prompt() -> None:
    alone = Reading(first_s=1, first_tokens=1, loads=20, load_s=1, load_bytes=200, compute_s=0.25, loads_unused=1)
    only = decoding(READ, prompt_only=alone)
    assert (only.loads, only.load_s, only.load_bytes, only.compute_s) == (50, 2, 500, 0.5)
    assert (only.loads_unused, only.between_s, only.first_s) == (3, 4, 1.5)


def test_a_row_by_hand() -> None:
    row = row_of(a_run(), REFERENCE)
    assert row.tokens_per_s == 4.0
    assert row.ratio_to_resident == 0.5
    assert (row.ttft_s, row.ttft_ratio) == (1.0, 2.0)
    assert (row.server_bytes, row.node_bytes, row.predictor_bytes, row.device_bytes) == (300, 200, 400, 1000)
    assert row.device_bytes_ratio == 0.25
    assert row.stall_share == 0.125
    assert row.link_utilisation == 3 / (2 * 4)
    assert (row.recall, row.recall_in_time) == (62 / 64, 60 / 64)
    assert (row.loads, row.loads_unused, row.tokens) == (70, 3, 16)


def test_how_often_the_model_agreed_with_the_shadows_guesses() -> None:
    """Of those that steps verified; where they verified none, of the tokens the shadow went on with."""
    unverified = dataclasses.replace(READ, guesses=0, agreed=0)
    assert row_of(a_run(), REFERENCE).agreement == 6 / 8
    assert row_of(a_run(decoded=[unverified], runs_ahead=True), REFERENCE).agreement == 1 - 4 / 16
    assert row_of(a_run(decoded=[unverified]), REFERENCE).agreement is None


def test_several_prompts_give_medians_of_speeds_and_shares_of_all_their_time() -> None:
    fast = dataclasses.replace(READ, between_s=1.0, stall_s=0.5)
    row = row_of(a_run(decoded=[READ, fast, fast], first_s=[1.0, 3.0, 2.0]), REFERENCE)
    assert row.tokens_per_s_runs == [4.0, 16.0, 16.0]
    assert (row.tokens_per_s, row.ttft_s) == (16.0, 2.0)
    assert row.stall_share == 1.5 / 6


def test_the_resident_row_is_one_in_everything() -> None:
    row = resident_row(implementation="eager", speeds=[8.0], reference=REFERENCE, tokens=16)
    assert (row.ratio_to_resident, row.ttft_ratio, row.device_bytes_ratio) == (1, 1, 1)
    assert row.link_ratio is None


def test_the_link_takes_so_many_times_a_layers_computation_for_an_expert() -> None:
    speed = link_gbps(record_bytes=44_000_000, link_ratio=4.4, layer_s=0.01)
    assert math.isclose(speed, 1.0)
    assert math.isclose(44_000_000 / (speed * 1e9), 4.4 * 0.01)


@pytest.mark.parametrize(
    ("nodes", "record_bytes", "shadow_bytes", "slots"),
    [(8, 10, 0, 1), (8, 10, 79, 1), (8, 10, 80, 2), (8, 31_457_280, 1_650_000_000, 7), (2, 100, 150, 1)],
)
def test_the_cache_gets_the_shadows_bytes_too(nodes: int, record_bytes: int, shadow_bytes: int, slots: int) -> None:
    found = lru_slots(nodes=nodes, record_bytes=record_bytes, shadow_bytes=shadow_bytes)
    assert found == slots
    assert found * nodes * record_bytes <= nodes * record_bytes + shadow_bytes


def test_every_variant_is_one_that_serve_can_run() -> None:
    for variant in VARIANTS:
        ServeSettings(**variant.settings)


def test_variants_are_chosen_by_name() -> None:
    assert [variant.name for variant in named(["no-predictor", "on-demand"])] == ["on-demand", "no-predictor"]
    assert set(QUICK) < {variant.name for variant in VARIANTS}
    assert chosen(quick=True) == list(QUICK)
    with pytest.raises(ValueError, match="'on-demnad'"):
        named(["on-demnad"])


def test_the_cache_is_measured_after_a_shadow_it_gets_the_bytes_of() -> None:
    names = [variant.name for variant in VARIANTS]
    assert all(names.index("on-demand") < names.index(v.name) for v in VARIANTS if v.same_bytes)


def test_two_cores_stand_for_two_devices() -> None:
    assert choose([3, 0, 1]) == Cores(main=3, beside=0)
    assert choose([2]) == choose([]) == Cores(main=None, beside=None)
    assert "nothing was pinned" in choose([2]).words
    assert pinned(["a", "b"], None) == ["a", "b"]
    assert pinned(["a", "b"], 3)[-3:] == ["3", "a", "b"]
