"""What `odmoe plan` says: shapes, memory, first token, the search, the paper's figures, and the command itself."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from odmoe_server import cli
from odmoe_server.planner import memory, paper, prefill, search, shape
from odmoe_server.planner.answer import Question, answer, first_token_s, shadow_begins_s, speed
from odmoe_server.planner.command import question_of
from odmoe_server.planner.machines import Network, Node, times
from odmoe_server.planner.question import PlanSettings
from odmoe_server.planner.report import answer_table
from support.stores import tiny_store

RUNNER = CliRunner()
MIXTRAL = shape.named("mixtral-8x7b", weight_bits=8)
QUICK = ["--output-tokens", "4"]


def question(**settings: object) -> Question:
    return question_of(PlanSettings(output_tokens=32, **settings))  # type: ignore[arg-type]  # fields by name


@pytest.mark.parametrize(
    ("name", "billions", "active"),
    [("mixtral-8x7b", 46.7, 12.9), ("qwen3-235b-a22b", 235, 22), ("deepseek-v3", 671, 37.6)],
)
def test_published_shapes_have_the_parameters_their_names_say(name: str, billions: float, active: float) -> None:
    model = shape.named(name, weight_bits=8)
    assert (model.non_expert_bytes + model.experts_bytes) / 1e9 == pytest.approx(billions, rel=0.005)
    used = model.non_expert_bytes + model.layers * model.top_k * model.expert_bytes
    assert used / 1e9 == pytest.approx(active, rel=0.02)


def test_weights_of_twice_the_width_have_twice_the_bytes() -> None:
    wide = shape.named("deepseek-v3", weight_bits=32)
    narrow = shape.named("deepseek-v3", weight_bits=16)
    for name in ("expert_bytes", "main_bytes", "non_expert_bytes", "kv_bytes_per_token", "row_bytes"):
        assert getattr(wide, name) == 2 * getattr(narrow, name)


def test_a_store_describes_its_shape(tmp_path: Path) -> None:
    """Tiny Mixtral: 3 layers of 8 experts, 3 x 64 x 96 fp32 values each; tables of 128 x 64; 2 KV heads of 16."""
    mixtral = shape.of_store(tiny_store("mixtral", tmp_path / "mixtral"))
    assert (mixtral.layers, mixtral.num_experts, mixtral.top_k, mixtral.hidden_size) == (3, 8, 2, 64)
    assert mixtral.expert_bytes == 3 * 64 * 96 * 4
    assert mixtral.non_expert_bytes - mixtral.main_bytes == 128 * 64 * 4
    assert mixtral.kv_bytes_per_token == 3 * 2 * 2 * 16 * 4
    assert mixtral.weight_bits == 32
    # Its cache holds a latent of 16 and a rotary key of 8, in 3 layers, one of which has no experts.
    deepseek = shape.of_store(tiny_store("deepseek_v3", tmp_path / "deepseek"))
    assert (deepseek.layers, deepseek.kv_bytes_per_token) == (2, 3 * (16 + 8) * 4)


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not an expert store"):
        shape.of_store(tmp_path)


def test_memory_counts_slots_weights_and_the_shadow() -> None:
    machines = replace(paper.UNFITTED, nodes=(Node(slots=2, link_gb_per_s=1),) * 6, shadow_bits=4)
    needed = memory.of(MIXTRAL, machines, context_tokens=10)
    weights = MIXTRAL.experts_bytes + MIXTRAL.non_expert_bytes
    assert needed.node_bytes == 2 * MIXTRAL.expert_bytes
    assert needed.shadow_bytes == weights // 2 + 10 * MIXTRAL.kv_bytes_per_token
    assert needed.total_bytes == needed.main_bytes + needed.shadow_bytes + 12 * MIXTRAL.expert_bytes
    # Three groups share 32 layers, so one has 11.
    assert needed.store_read_decoding_bytes == 11 * 8 * MIXTRAL.expert_bytes
    assert memory.of(MIXTRAL, machines, context_tokens=10, shadow=False).shadow_bytes == 0
    # A group that loads three times as fast as the only other one serves 24 of 32 layers.
    unlike = replace(machines, nodes=tuple(Node(slots=1, link_gb_per_s=speed) for speed in (3, 3, 1, 1)))
    read_bytes = memory.of(MIXTRAL, unlike, context_tokens=10).store_read_decoding_bytes
    assert read_bytes == 24 * 8 * MIXTRAL.expert_bytes


def test_a_prompt_needs_nearly_every_expert() -> None:
    assert prefill.active_experts(MIXTRAL, 1) == 2
    assert prefill.active_experts(MIXTRAL, 16) == pytest.approx(7.92, abs=0.01)


def test_first_token_adds_up_layer_by_layer() -> None:
    machines = replace(paper.UNFITTED, main_s=1.0, expert_s=2.0, nodes=(Node(slots=1, link_gb_per_s=1),) * 4)
    load_s = MIXTRAL.expert_bytes / 1e9
    talk_s = 100 * (2 + 2) * 4096 * 2 * 8 / 1e9 + 2 * 0.1e-3
    plain_s = 32 * (1 + talk_s + 2 * (load_s + 2))
    assert prefill.prefill_s(MIXTRAL, machines, prompt_tokens=100, overlap=False) == pytest.approx(plain_s)
    # With loads ahead, nodes get their rows one after the other: what is left of the talk is one row out and all back.
    overlapped_s = prefill.prefill_s(MIXTRAL, machines, prompt_tokens=100, overlap=True)
    assert overlapped_s == pytest.approx(load_s + 32 * (1 + 2 + load_s + 2), rel=0.02)
    two_slots = replace(machines, nodes=(Node(slots=2, link_gb_per_s=1),) * 4)
    hidden_s = prefill.prefill_s(MIXTRAL, two_slots, prompt_tokens=100, overlap=True)
    assert hidden_s == pytest.approx(load_s + 32 * (1 + 2 * 2), rel=0.02)
    assert hidden_s < overlapped_s < plain_s


def test_phases_on_a_core_that_all_share() -> None:
    machines = replace(
        paper.UNFITTED,
        main_s=1.0,
        expert_s=2.0,
        nodes=(Node(slots=1, link_gb_per_s=1),) * 4,
        shared_core=True,
        network=Network(latency_s=0.0, gbit_per_s=1e9, overhead_s=0.5),
    )
    load_s = MIXTRAL.expert_bytes / 1e9
    plain_s = 32 * (1 + 2 * 4 * 0.5 + 2 * load_s + 8 * 2)
    assert prefill.prefill_s(MIXTRAL, machines, prompt_tokens=100, overlap=False) == pytest.approx(plain_s)


def test_the_shadow_gets_the_prompts_keys_and_values_or_makes_them() -> None:
    """Sent, they take 128 tokens' bytes on the wire; made by a shadow that is as fast as the first token, nothing."""
    sent, made = (question(prompt_kv=whose) for whose in ("full", "own"))
    steps = times(sent.shape, sent.machines)
    assert shadow_begins_s(sent, steps) == pytest.approx(0.1e-3 + 128 * sent.shape.kv_bytes_per_token * 8 / 1e9)
    assert shadow_begins_s(made, steps) == 0.0
    slow = question(prompt_kv="own", shadow_ms=1000.0)
    assert shadow_begins_s(slow, steps) == pytest.approx(32 - first_token_s(slow))
    assert speed(sent) < speed(made)


def test_the_search_finds_the_fewest_nodes() -> None:
    asked = question(recall=1.0)
    found = search.nodes_for(asked, 9.0)
    assert found.least is not None
    assert found.tokens_per_s >= 9.0
    enough = replace(asked, machines=replace(asked.machines, nodes=(asked.machines.nodes[0],) * int(found.least)))
    fewer = replace(asked, machines=replace(asked.machines, nodes=(asked.machines.nodes[0],) * int(found.least - 2)))
    assert speed(enough) == found.tokens_per_s
    assert speed(fewer) < 9.0


def test_the_search_finds_the_slowest_link() -> None:
    asked = question()
    found = search.link_for(asked, 9.0)
    assert found.least is not None
    assert speed(question(link_gb_per_s=(found.least,))) >= 9.0
    assert speed(question(link_gb_per_s=(found.least * 0.97,))) < 9.0


def test_the_search_says_what_the_most_is() -> None:
    asked = question()
    nodes, link = search.nodes_for(asked, 1000), search.link_for(asked, 1000)
    assert nodes.least is link.least is None
    assert speed(asked) < nodes.tokens_per_s < 1000
    assert speed(asked) < link.tokens_per_s < 1000


# ------------------------------------------------------------------------------------------------------- the paper


@pytest.fixture(scope="module")
def rows() -> list[paper.Row]:
    return paper.compare()


def test_every_prediction_of_the_papers_figures_is_within_a_tenth(rows: list[paper.Row]) -> None:
    assert [f"{row.what}: {row.difference}" for row in rows if row.off] == []
    assert [row.what for row in rows if row.status == "fitted"] == ["load after routing"]
    assert [row.what for row in rows if row.ours is None] == ["token only", "KV only"]
    assert len(rows) == 17


def test_the_fit_meets_the_row_it_is_fitted_to(rows: list[paper.Row]) -> None:
    fitted = next(row for row in rows if row.status == "fitted")
    assert fitted.ours == pytest.approx(fitted.paper)
    overhead_ms = 1e3 * paper.testbed().device.overhead_s
    assert PlanSettings().overhead_ms == pytest.approx(overhead_ms, abs=0.005)


def test_drifting_recall_is_as_printed() -> None:
    recall = paper.drifting_recall()
    assert recall[0] == 1.0
    assert sum(recall) / len(recall) == pytest.approx(0.45, abs=0.001)
    assert recall[255] == pytest.approx(0.30, abs=0.01)


@pytest.mark.parametrize(("ours", "off"), [(1.09, False), (1.11, True), (0.89, True), (None, False)])
def test_a_figure_is_off_beyond_a_tenth(ours: float | None, off: bool) -> None:
    assert paper.Row(table="t", what="w", unit="u", paper=1.0, ours=ours).off is off


# ------------------------------------------------------------------------------------------------------ the command


def test_it_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    result = RUNNER.invoke(cli.app, ["plan", "--help"])
    assert result.exit_code == 0
    assert "--tokens-per-s" in result.output + capsys.readouterr().out


def test_the_comparison_is_a_command() -> None:
    result = RUNNER.invoke(cli.app, ["plan", "--paper"])
    assert result.exit_code == 0
    assert "fitted" in result.stdout
    assert "not compared" in result.stdout


def test_a_figure_that_is_off_fails_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper, "compare", lambda: [paper.Row(table="t", what="w", unit="u", paper=1.0, ours=2.0)])
    result = RUNNER.invoke(cli.app, ["plan", "--paper"])
    assert result.exit_code == 1
    assert "TOO FAR OFF" in result.stdout


@pytest.mark.parametrize(("wanted", "status", "says"), [("4", 0, "nodes"), ("1000", 1, "cannot be reached")])
def test_how_many_nodes(wanted: str, status: int, says: str) -> None:
    result = RUNNER.invoke(cli.app, ["plan", *QUICK, "--tokens-per-s", wanted])
    assert result.exit_code == status
    assert says in result.stdout


def test_nodes_may_differ() -> None:
    result = RUNNER.invoke(
        cli.app, ["plan", *QUICK, "--nodes", "3", "--link-gb-per-s", "25,25,12.5", "--slots", "1,2,3"]
    )
    assert result.exit_code == 0
    assert "28.2 ms" in result.stdout


def test_one_core_for_all_and_messages_cost_speed() -> None:
    plain, shared, talking = (
        speed(question(**options)) for options in ({}, {"shared_core": True}, {"message_ms": 2.0})
    )
    assert shared < plain
    assert talking < plain
    result = RUNNER.invoke(cli.app, ["plan", *QUICK, "--shared-core", "--message-ms", "0.5"])
    assert result.exit_code == 0


def test_a_store_can_be_asked_about(tmp_path: Path) -> None:
    store = tiny_store("mixtral", tmp_path)
    result = RUNNER.invoke(cli.app, ["plan", *QUICK, "--model", str(store)])
    assert result.exit_code == 0
    assert "tokens/s" in result.stdout


@pytest.mark.parametrize(
    ("argv", "status", "says"),
    [
        (["--paper", "--nodes", "4"], 2, "--paper takes nothing else, not --nodes"),
        (["--bench", "x.json", "--nodes", "4"], 2, "--bench takes nothing else, not --nodes"),
        (["--bench", "no-such.json"], 1, "no-such.json cannot be read"),
        (["--predictor", "none", "--prompt-kv", "own"], 2, "--prompt-kv says nothing without --predictor shadow"),
        (["--prefill-chunk", "0"], 2, "--prefill-chunk"),
        (["--model", "x", "--weight-bits", "8"], 2, "leave out --shape"),
        (["--model", "no-such"], 1, "not an expert store"),
        (["--shape", "no-such"], 1, "there is no shape 'no-such'"),
        (["--predictor", "none", "--recall", "0.9"], 2, "--recall says nothing without --predictor shadow"),
        (["--agreement", "0.9"], 2, "--agreement says nothing without --run-ahead"),
        (["--slots", "1,2"], 2, "one number or 8"),
        (["--link-gb-per-s", "0"], 2, "must be above 0"),
        (["--slots", "0"], 2, "must be above 0"),
        (["--nodes", "2", "--slots", "1,2", "--tokens-per-s", "4"], 2, "alike"),
        (["--nodes", "0"], 2, "--nodes"),
    ],
)
def test_failures_are_lines(argv: list[str], status: int, says: str) -> None:
    result = RUNNER.invoke(cli.app, ["plan", *argv])
    assert result.exit_code == status
    assert says in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(("nodes", "is_said"), [(1, True), (2, False), (8, False)])
def test_it_says_when_a_layer_has_one_node_only(nodes: int, is_said: bool) -> None:
    asked = question(nodes=nodes)
    console = Console(file=io.StringIO(), width=200)
    console.print(answer_table(asked, answer(asked)))
    assert isinstance(console.file, io.StringIO)
    assert ("one node that can hold it" in console.file.getvalue()) is is_said
