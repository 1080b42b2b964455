"""`odmoe plan --bench`: a record of `odmoe bench decode` against predictions that can be worked out by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from odmoe_server import cli
from odmoe_server.planner import bench, bench_record

RUNNER = CliRunner()
# Four layers of a main part of 1 ms and two experts of 2 ms; a load takes four layers, 20 ms.
LAYERS, MAIN_S, EXPERT_S, LOAD_S = 4, 1e-3, 2e-3, 20e-3
RESIDENT = 1 / (LAYERS * (MAIN_S + 2 * EXPERT_S))
# Both loads at once on two nodes, then one expert after the other on the core they share.
AFTER_ROUTING = 1 / (LAYERS * (MAIN_S + LOAD_S + 2 * EXPERT_S))
# Two groups and loads far longer than all else: a node's load begins when its expert before was computed. The node
# that was first is ready first again, so a turn of two layers takes a load and one expert.
ON_DEMAND = 1 / (LAYERS / 2 * (LOAD_S + EXPERT_S))


def row(variant: str, tokens_per_s: float, **others: Any) -> dict[str, Any]:
    return {
        "variant": variant,
        "link_ratio": 4.0,
        "tokens_per_s": tokens_per_s,
        "slots": 1,
        "identical": True,
        **others,
    }


def record(*rows: dict[str, Any], **others: Any) -> dict[str, Any]:
    return {
        "name": "decode",
        "shape": {"family": "mixtral", "moe_layers": LAYERS, "experts": 8, "top_k": 2},
        "question": {"nodes": 4, "group_size": 2, "tokens": 101, "prompt_tokens": 16},
        "main_s": MAIN_S,
        "expert_s": EXPERT_S,
        "layer_s": MAIN_S + 2 * EXPERT_S,
        "rows": list(rows),
        **others,
    }


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content), "utf-8")
    return path


def compared(*rows: dict[str, Any], **others: Any) -> list[bench.Compared]:
    return bench.compare(bench_record.BenchRecord.model_validate_json(json.dumps(record(*rows, **others))))


def predicted(variant: str, *, of: dict[str, Any] | None = None, **others: Any) -> float:
    """Tokens/s of one variant."""
    (found,) = compared(row(variant, 1.0, **(of or {})), **others)
    assert found.predicted_tokens_per_s is not None, found.note
    return found.predicted_tokens_per_s


def test_everything_resident_is_a_sum() -> None:
    (found,) = compared(row("resident", RESIDENT, link_ratio=None))
    assert found.predicted_tokens_per_s == pytest.approx(RESIDENT)
    assert found.difference == pytest.approx(0)


def test_nodes_that_compute_on_arrival_compute_less_after_a_load() -> None:
    known = {"recall": 1.0}
    assert predicted("on-demand", of=known) == pytest.approx(ON_DEMAND, rel=0.05)
    ahead = 1 / (LAYERS / 2 * (LOAD_S + EXPERT_S / 3))
    assert predicted("on-demand", of=known, first_stage=2 / 3) == pytest.approx(ahead, rel=0.05)
    assert predicted("on-demand", of=known, first_stage=2 / 3) > 1.03 * predicted("on-demand", of=known)


def without_loads(*, message_s: float = 0.0, first_s: float = 80e-3) -> dict[str, Any]:
    """Two nodes are called a layer, so it has four messages."""
    given = {"layer_s": MAIN_S + 2 * EXPERT_S + 4 * message_s, "first_s": first_s}
    return {"on-demand": given, "no-predictor": given}


def test_load_after_routing_is_a_sum() -> None:
    assert predicted("no-predictor") == pytest.approx(AFTER_ROUTING)
    # A row out before the first load, a result between the experts, and one behind; the other row goes under the load.
    with_messages = 1 / (LAYERS * (MAIN_S + LOAD_S + 2 * EXPERT_S + 3 * 0.5e-3))
    given = without_loads(message_s=0.5e-3)
    assert predicted("no-predictor", without_loads=given) == pytest.approx(with_messages)


def test_messages_of_a_run_with_a_predictor_are_told_from_one_without() -> None:
    dear, free = without_loads(message_s=2e-3), without_loads()
    given = {"on-demand": dear["on-demand"], "no-predictor": free["no-predictor"]}
    assert predicted("no-predictor", without_loads=given) == pytest.approx(AFTER_ROUTING)
    fast = {"recall": 1.0, "link_ratio": 0.001}
    assert predicted("on-demand", of=fast, without_loads=given) == pytest.approx(
        1 / (LAYERS * (MAIN_S + 2 * EXPERT_S + 4 * 2e-3)), rel=0.01
    )


def test_perfect_forecasts_are_bound_by_loads() -> None:
    """A hundred tokens of two turns each, but for the first loads and what follows the last."""
    assert predicted("on-demand", of={"recall": 1.0}) == pytest.approx(ON_DEMAND, rel=0.02)


def test_fast_links_leave_the_resident_speed() -> None:
    assert predicted("on-demand", of={"recall": 1.0, "link_ratio": 0.5}) == pytest.approx(RESIDENT, rel=0.01)


def test_forecasts_that_are_always_wrong_are_no_better_than_none() -> None:
    assert predicted("on-demand", of={"recall": 0.0}) == pytest.approx(AFTER_ROUTING, rel=0.01)


def test_late_departure_costs_the_first_layers() -> None:
    """The shadow knows a token when the one before has ended: all loads of two layers begin together, and those of the
    next two as soon as an expert has left its slot."""
    early, late = predicted("on-demand", of={"recall": 1.0}), predicted("on-demand-late", of={"recall": 1.0})
    # Layer 0 is loaded at 20 ms; its first node has layer 2's expert an expert and a load later, its second node
    # another expert later. Layer 3 is loaded by the time it is needed.
    third_s = LOAD_S + EXPERT_S + LOAD_S + EXPERT_S + EXPERT_S
    assert late == pytest.approx(1 / (third_s + MAIN_S + 2 * EXPERT_S), rel=0.01)
    assert late < early


def test_a_shadow_that_is_often_wrong_departs_late() -> None:
    always, never = (predicted("on-demand", of={"recall": 1.0, "agreement": share}) for share in (1.0, 0.0))
    assert never == pytest.approx(predicted("on-demand-late", of={"recall": 1.0}))
    assert never < predicted("on-demand", of={"recall": 1.0, "agreement": 0.5}) < always


def test_a_slow_shadow_bounds_the_speed() -> None:
    assert predicted("on-demand", of={"recall": 1.0}, shadow_layer_s=0.1) < predicted("on-demand", of={"recall": 1.0})
    assert predicted("no-alignment", of={"recall": 1.0}, shadow_layer_s=20e-3) == pytest.approx(
        1 / (LAYERS * 20e-3), rel=0.05
    )


def test_unaligned_variants_do_not_wait_for_the_token_before() -> None:
    aligned = predicted("kv-only", of={"recall": 1.0})
    assert aligned == pytest.approx(predicted("token-only", of={"recall": 1.0}))
    assert predicted("no-alignment", of={"recall": 1.0}) > aligned


def test_a_cache_is_as_fast_as_its_hits() -> None:
    needed = 100 * LAYERS * 2
    lru = {"slots": 9, "tokens": 100}
    assert predicted("lru", of={**lru, "loads": 0}) == pytest.approx(RESIDENT)
    assert predicted("lru", of={**lru, "loads": needed}) == pytest.approx(AFTER_ROUTING)
    # With half of them found, one layer in four finds both and one in four none; where one is found, it is computed
    # under the other's load.
    layer_s = 0.25 * 2 * EXPERT_S + 0.5 * (LOAD_S + EXPERT_S) + 0.25 * (LOAD_S + 2 * EXPERT_S) + MAIN_S
    assert predicted("lru", of={**lru, "loads": needed // 2}) == pytest.approx(1 / (LAYERS * layer_s), rel=0.05)


def test_first_tokens_come_from_those_without_loads() -> None:
    """80 ms of computing, so 20 ms a layer: 4 of it the main part, each of 8 experts 2. Four nodes load two each."""
    fast, slow = compared(
        row("no-predictor", 1.0, link_ratio=0.001, ttft_s=0.1),
        row("no-predictor", 1.0, ttft_s=1.0),
        without_loads=without_loads(),
    )
    assert fast.predicted_first_s == pytest.approx(80e-3, rel=0.01)
    # A node loads and computes one expert after the other, eight in all; the first load begins with the prompt. All
    # four are ready together at first and come to be an expert apart, so only the last one's wait is seen.
    assert slow.predicted_first_s == pytest.approx(8 * (LOAD_S + EXPERT_S) + 3 * EXPERT_S, rel=0.01)
    assert slow.predicted_first_s is not None
    assert slow.first_difference == pytest.approx(slow.predicted_first_s - 1)


def test_what_cannot_be_predicted_says_why() -> None:
    rows = compared(
        row("resident", RESIDENT),
        row("on-demand", 1.0),
        row("lru", 1.0),
        row("no-predictor", 1.0, link_ratio=None),
        row("telepathy", 1.0),
    )
    assert [one.note for one in rows[1:]] == [
        "the row has no recall",
        "the row does not say how many loads there were",
        "the row has no link_ratio",
        "the model does not know this variant",
    ]
    assert all(one.predicted_tokens_per_s is None and not one.off for one in rows[1:])


# ------------------------------------------------------------------------------------------------------ the command


def good() -> list[dict[str, Any]]:
    return [
        row("resident", RESIDENT, link_ratio=None, ttft_s=80e-3),
        row("on-demand", ON_DEMAND, recall=1.0, ttft_s=0.2),
        row("no-predictor", AFTER_ROUTING, ttft_s=0.2),
    ]


def test_the_comparison_is_a_command(tmp_path: Path) -> None:
    result = RUNNER.invoke(cli.app, ["plan", "--bench", str(write(tmp_path / "r.json", record(*good())))])
    assert result.exit_code == 0, result.output
    assert "no-predictor" in result.stdout
    assert "TOO FAR OFF" not in result.stdout
    assert "taken as nothing" in result.stdout
    assert "first token, s" not in result.stdout
    content = record(*good(), without_loads=without_loads())
    result = RUNNER.invoke(cli.app, ["plan", "--bench", str(write(tmp_path / "r.json", content))])
    assert result.exit_code == 0
    assert "first token, s" in result.stdout
    assert "messages are taken to take nothing" not in result.stdout


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("times", [0.7, 1.3])
def test_a_measured_speed_that_is_altered_fails_it(index: int, times: float, tmp_path: Path) -> None:
    rows = good()
    rows[index]["tokens_per_s"] *= times
    result = RUNNER.invoke(cli.app, ["plan", "--bench", str(write(tmp_path / "r.json", record(*rows)))])
    assert result.exit_code == 1
    assert result.stdout.count("TOO FAR") == 1


def test_a_first_token_that_is_off_does_not_fail_it(tmp_path: Path) -> None:
    rows = good()
    rows[1]["ttft_s"] = 50.0
    result = RUNNER.invoke(cli.app, ["plan", "--bench", str(write(tmp_path / "r.json", record(*rows)))])
    assert result.exit_code == 0


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("no record", "Input should be an object"),
        ({"rows": []}, "shape: Field required"),
        (record(), "rows: List should have at least 1 item"),
        (record(*good(), main_s=-1.0), "main_s: Input should be greater than 0"),
        (record(*good(), main_s="fast"), "main_s: Input should be a valid number"),
        (record(row("resident", 0.0)), "rows.0.tokens_per_s: Input should be greater than 0"),
        (record(row("on-demand", 1.0, recall=1.5)), "rows.0.recall: Input should be less than or equal to 1"),
        (record(row("on-demand", 1.0)), "none of the record's rows can be predicted: the row has no recall"),
    ],
)
def test_what_is_no_record_is_refused(content: object, says: str, tmp_path: Path) -> None:
    result = RUNNER.invoke(cli.app, ["plan", "--bench", str(write(tmp_path / "r.json", content))])
    assert result.exit_code == 1
    assert says in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.stderr


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_bytes(b'{"rows": [')
    for path, says in [(tmp_path / "r.json", "Invalid JSON"), (tmp_path / "none.json", "No such file")]:
        with pytest.raises(ValueError, match=says):
            bench_record.read(path)
