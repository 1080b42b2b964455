"""The figures of the status page and of `odmoe status`, from healths one after another, and how they are shown."""

from dataclasses import replace

import msgspec
import pytest
from rich.console import Console

from odmoe_server.engine_api import EngineHealth, ExpertStats, Spread
from odmoe_server.status import terminal
from odmoe_server.status.feed import WINDOW_S, Feed, Status
from support.scripted_engine import READY

NODE, PREDICTOR = READY.nodes


def after(health: EngineHealth, *, tokens: int) -> EngineHealth:
    """The same server some tokens later: for each, ten activations of which nine were forecast, two loads of 0.1 s and
    0.02 s of stall."""
    totals, node = health.totals, health.nodes[0]
    assert node.load_times is not None
    spread = Spread(
        bounds=node.load_times.bounds,
        counts=(node.load_times.counts[0] + 2 * tokens, *node.load_times.counts[1:]),
        sum=node.load_times.sum + 0.2 * tokens,
    )
    return replace(
        health,
        generation_tokens_total=health.generation_tokens_total + tokens,
        totals=replace(
            totals,
            activations=totals.activations + 10 * tokens,
            predicted=totals.predicted + 9 * tokens,
            stall_s=totals.stall_s + 0.02 * tokens,
        ),
        nodes=(
            replace(node, loads_total=node.loads_total + 2 * tokens, load_times=spread),
            replace(health.nodes[1], forecasts_total=health.nodes[1].forecasts_total + 30 * tokens),
        ),
    )


def feed() -> Feed:
    return Feed(version="1", model="tiny")


def test_the_first_picture_has_totals_and_no_rates() -> None:
    status = feed().status(READY, 100.0)
    assert (status.tokens_per_s, status.loads_per_s) == (0, 0)
    assert (status.recall_lately, status.stall_s_per_token) == (None, None)
    assert status.recall == 0.9
    assert status.load_s == pytest.approx(0.5 / 7), "the mean of all there were"
    assert (status.running, status.queued, status.lead_layers, status.realigns) == (1, 2, 47, 45)
    assert (status.kv_bytes, status.kv_budget_bytes) == (400, 1600)
    assert [(line.hit, line.late, line.missed) for line in status.layers] == [(5, 1, 0), (2, 1, 1)]
    assert [(line.ago_s, line.text) for line in status.story] == [(12.5, "node node-0 joined")]


def test_rates_are_those_between_two_pictures() -> None:
    looking = feed()
    looking.status(READY, 100.0)
    status = looking.status(after(READY, tokens=20), 102.0)
    assert status.tokens_per_s == 10
    assert status.recall_lately == pytest.approx(0.9)
    assert status.stall_s_per_token == pytest.approx(0.02)
    assert status.loads_per_s == 20
    assert status.load_s == pytest.approx(0.1), "of the window alone"
    node, predictor = status.nodes
    assert (node.loads_per_s, node.load_s, node.used_slots, node.slots) == (20, pytest.approx(0.1), 1, 4)
    assert predictor.forecasts_per_s == 300


def test_what_is_older_than_the_window_does_not_count() -> None:
    looking, health = feed(), READY
    for second in range(20):
        health = after(health, tokens=50 if second < 10 else 1)
        status = looking.status(health, float(second))
    assert status.tokens_per_s == pytest.approx(1)
    assert status.window_s == WINDOW_S


def test_a_node_that_starts_anew_counts_from_nothing_and_is_no_step_back() -> None:
    looking = feed()
    looking.status(after(READY, tokens=100), 0.0)
    status = looking.status(READY, 1.0)
    assert status.nodes[0].loads_per_s == 0
    assert status.nodes[0].load_s == pytest.approx(0.5 / 7)


def test_before_anything_was_decoded_there_are_no_shares() -> None:
    idle = replace(READY, totals=ExpertStats(), nodes=())
    status = feed().status(idle, 0.0)
    assert (status.recall, status.load_s, status.nodes) == (None, None, ())


def test_late_forecasts_cannot_make_it_more_than_all() -> None:
    looking = feed()
    looking.status(READY, 0.0)
    late = replace(READY, totals=replace(READY.totals, activations=12, predicted=10, predicted_late=2))
    assert looking.status(late, 1.0).recall_lately == 1.0


def test_a_picture_survives_the_wire() -> None:
    status = feed().status(READY, 0.0)
    assert msgspec.json.decode(msgspec.json.encode(status), type=Status) == status


def shown(health: EngineHealth) -> str:
    console = Console(width=120, record=True, file=open("/dev/null", "w", encoding="utf-8"))  # noqa: SIM115
    console.print(terminal.screen(feed().status(health, 0.0)))
    console.file.close()
    return console.export_text()


def test_the_terminal_shows_nodes_slots_and_what_happened() -> None:
    text = shown(READY)
    for part in ("tiny", "● ready", "forecast recall 90.0 %", "■□□□", "1/4", "waiting 1 / 2", "joined"):
        assert part in text, part


def test_the_terminal_shows_who_is_gone_and_why_it_waits() -> None:
    gone = replace(READY, state="waiting", detail="waiting for a node", nodes=(replace(NODE, alive=False), PREDICTOR))
    text = shown(gone)
    assert "waiting: waiting for a node" in text
    assert "gone" in text


def test_what_peers_say_cannot_play_with_the_terminal() -> None:
    story = ((1.0, "node n left: \x1b]0;owned\x07 gone"),)
    text = shown(replace(READY, cluster=replace(READY.cluster, story=story)))
    assert "node n left: ]0;owned gone" in text


def test_an_address_without_its_scheme_is_told_in_a_line() -> None:
    with pytest.raises(terminal.StatusError, match="--url begins with http://"):
        terminal.show("nonsense", api_key=None, once=True, as_json=False, console=Console())


def test_a_server_that_is_not_there_is_told_in_a_line() -> None:
    with pytest.raises(terminal.StatusError, match=r"no answer from http://127\.0\.0\.1:9 .*odmoe serve"):
        terminal.show("http://127.0.0.1:9", api_key=None, once=True, as_json=False, console=Console())
