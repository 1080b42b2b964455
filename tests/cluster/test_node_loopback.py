"""A real node agent with a real store over loopback links, in virtual time."""

from pathlib import Path

import pytest
import torch

from odmoe_model.experts import ExpertMaths
from odmoe_wire.messages import (
    Bye,
    Cancel,
    ComputeFailed,
    Heartbeat,
    Hello,
    Load,
    Loaded,
    Member,
    ProtocolErrorNotice,
    Release,
    Result,
    Rollback,
    SlotReport,
    Span,
    View,
)
from support.node_loopback import HEARTBEAT_S, LOST_AFTER_S, NodeOnLoopback
from support.stores import tiny_store


@pytest.fixture(scope="module")
def store_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_store("mixtral", tmp_path_factory.mktemp("node"))


@pytest.fixture
def node(store_path: Path) -> NodeOnLoopback:
    return NodeOnLoopback(store_path, num_slots=2)


def rows_for(experts: dict[int, int], *, seed: int = 0) -> dict[int, torch.Tensor]:
    """Random x_NH per expert, N as given."""
    generator = torch.Generator().manual_seed(seed)
    return {expert: torch.randn(count, 64, generator=generator) for expert, count in experts.items()}


def expected(node: NodeOnLoopback, layer: int, rows: dict[int, torch.Tensor]) -> torch.Tensor:
    maths = ExpertMaths(node.store.manifest)
    fields = {expert: node.store.fields(node.store.record(layer, expert)) for expert in rows}
    return torch.cat([maths.rows(fields[expert], x_NH) for expert, x_NH in rows.items()])


def test_results_are_the_experts_rows_to_the_last_bit_with_fewer_slots_than_experts(node: NodeOnLoopback) -> None:
    for number, layer in enumerate((0, 1, 2, 0)):
        rows = rows_for({6: 3, 1: 1, 4: 2, 0: 1}, seed=number)
        node.compute(layer, rows, request_id=number, position=number)
        assert torch.equal(node.result_rows(), expected(node, layer, rows))
    assert len(node.said(Result)) == 4
    assert node.agent.state.used_slots == 0


def test_each_run_has_the_bits_of_a_compute_of_its_own(node: NodeOnLoopback) -> None:
    rows = rows_for({6: 3, 1: 1, 4: 4})
    node.compute(1, rows, runs=[1, 1, 1, 1, 3, 1])
    together = node.result_rows()
    alone = {6: [1, 1, 1], 1: [1], 4: [3, 1]}
    apart = [expected(node, 1, {e: run}) for e, x_NH in rows.items() for run in torch.split(x_NH, alone[e])]
    assert torch.equal(together, torch.cat(apart))


def test_a_forecast_is_a_hit_and_its_bytes_are_accounted_until_computed(node: NodeOnLoopback) -> None:
    node.forecast(0, [5])
    record_bytes = node.store.manifest.record_bytes
    assert node.agent.report().accounted_bytes == record_bytes
    rows = rows_for({5: 1})
    node.compute(0, rows)
    (result,) = node.said(Result)
    assert isinstance(result, Result)
    assert result.timings[0].outcome == "hit"
    assert torch.equal(node.result_rows(), expected(node, 0, rows))
    assert node.agent.report().accounted_bytes == 0


def test_a_load_is_told_of_with_the_next_answer_and_how_long_ago_it_was(node: NodeOnLoopback) -> None:
    node.forecast(0, [5])
    node.advance(HEARTBEAT_S / 2)
    assert node.said(Loaded) == [], "by itself it is not worth waking the server"
    node.compute(0, rows_for({5: 1}))
    result = node.at_server[-1].message
    assert isinstance(result, Result)
    (loaded,) = result.loaded
    assert (loaded.layer, loaded.expert, loaded.on_demand) == (0, 5, False)
    assert loaded.load_bytes == node.store.manifest.record_bytes
    assert loaded.ago_s == pytest.approx(HEARTBEAT_S / 2)
    node.advance(HEARTBEAT_S)
    assert node.said(Loaded) == [], "once"


def test_a_load_nobody_asks_for_is_told_of_with_the_next_life_sign(node: NodeOnLoopback) -> None:
    node.forecast(0, [5])
    node.advance(HEARTBEAT_S)
    assert len(node.said(Loaded)) == 1
    node.advance(HEARTBEAT_S)
    assert len(node.said(Loaded)) == 1, "once"


def test_loads_for_a_server_that_is_gone_are_not_told_to_the_next(node: NodeOnLoopback) -> None:
    node.forecast(0, [5])
    node.tell(Bye(reason="test"))
    node.welcome(epoch=1)
    node.advance(HEARTBEAT_S)
    assert node.said(Loaded) == []


def test_rollback_comes_from_the_predictor_alone(node: NodeOnLoopback) -> None:
    node.forecast(0, [5], position=3)
    node.tell(Rollback(sequence=1, position=0))
    assert node.agent.state.used_slots == 1
    node.predictor.send("n", Rollback(sequence=1, position=3), epoch=1)
    node.pump()
    assert node.agent.state.used_slots == 0


def test_experts_stay_while_the_view_says_so(node: NodeOnLoopback) -> None:
    members = [Member("n", node.hello.slots)]
    node.tell(View(members=members, group_size=1, mode="lru"))
    for position in range(2):
        rows = rows_for({5: 1})
        node.compute(0, rows, request_id=position, position=position)
        assert torch.equal(node.result_rows(), expected(node, 0, rows))
    assert node.agent.report().loads_total == 1
    node.tell(View(members=members, group_size=1))
    assert node.agent.report().accounted_bytes == 0


def test_slots_are_reused_and_really_hold_other_bytes(node: NodeOnLoopback) -> None:
    for layer in (0, 1, 2):
        for expert in range(8):
            rows = rows_for({expert: 2})
            node.compute(layer, rows, request_id=layer * 8 + expert, position=layer * 8 + expert)
            assert torch.equal(node.result_rows(), expected(node, layer, rows))
    assert node.agent.report().loads_total == 24
    assert node.agent.report().load_bytes_total == 24 * node.store.manifest.record_bytes


def test_hello_is_said_to_both_until_welcomed_and_then_heartbeats_with_reports(store_path: Path) -> None:
    node = NodeOnLoopback(store_path, num_slots=2, joined=False)
    for _ in range(4):
        node.advance(0.5)
    assert node.said(Hello) == [node.hello] * 5
    assert node.at_predictor == [node.hello] * 5
    node.welcome(epoch=3)
    node.advance(HEARTBEAT_S)
    assert len(node.said(Hello)) == 5
    assert node.said(Heartbeat) == [Heartbeat(count=0)]
    (report,) = node.said(SlotReport)
    assert isinstance(report, SlotReport)
    assert report.arena_bytes == report.budget_bytes == 2 * node.store.manifest.record_bytes
    assert report.rss_bytes > report.arena_bytes
    assert node.at_server[-1].epoch == 3
    assert node.at_predictor[-1] == Heartbeat(count=0)


def test_a_silent_server_is_lost_and_greeted_again_and_its_work_forgotten(node: NodeOnLoopback) -> None:
    node.forecast(0, [5])
    node.advance(LOST_AFTER_S)
    assert node.agent.state.used_slots == 0
    assert node.said(Hello)[-1] == node.hello
    hellos = len(node.said(Hello))
    node.advance(1.0)
    assert len(node.said(Hello)) == hellos + 1
    node.welcome(epoch=1)
    node.compute(0, rows_for({5: 1}))
    assert len(node.said(Result)) == 1


def test_a_server_that_does_not_know_the_node_is_greeted_at_once(node: NodeOnLoopback) -> None:
    node.forecast(0, [5])
    node.tell(Bye(reason="not admitted: say hello"))
    assert len(node.said(Hello)) == 2
    assert node.agent.state.used_slots == 0


def test_the_predictor_may_go_and_come_without_any_effect_on_results(node: NodeOnLoopback) -> None:
    node.network.cut("n", "predictor")
    rows = rows_for({2: 1})
    for number in range(8):
        node.tell(Heartbeat(count=number))
        node.advance(1.0)
        node.compute(0, rows, request_id=number, position=number)
    assert len(node.said(Result)) == 8
    node.network.heal("n", "predictor")
    node.advance(1.0)
    assert node.at_predictor[-1] == node.hello


def test_release_and_cancel_free_the_slots(node: NodeOnLoopback) -> None:
    node.forecast(0, [1])
    node.tell(Load(spans=[Span(1, 0)], layer=1, experts=[2]))
    assert node.agent.state.used_slots == 2
    node.tell(Release(spans=[Span(1, 0)], layer=0))
    assert node.agent.state.used_slots == 1
    node.tell(Cancel(sequence=1))
    assert node.agent.state.used_slots == 0
    assert node.agent.report().loads_unused_total == 2


def test_a_repeated_compute_is_answered_once(node: NodeOnLoopback) -> None:
    node.network.link_fault("server", "n", duplicate=1)
    node.compute(0, rows_for({1: 1}))
    node.compute(0, rows_for({1: 1}), request_id=0)
    assert len(node.said(Result)) == 1
    assert node.agent.state.counters.duplicates == 2
    assert node.agent._in_hand == {}, "the rows of repeated computes are dropped"


def test_a_bad_message_is_counted_and_answered_with_a_notice(node: NodeOnLoopback) -> None:
    node.tell(Load(spans=[Span(1, 0)], layer=99, experts=[0]))
    assert len(node.said(ProtocolErrorNotice)) == 1
    assert node.agent.report().protocol_errors_total == 1
    node.compute(0, rows_for({1: 1}))
    assert len(node.said(Result)) == 1


def test_rows_of_the_wrong_dtype_fail_that_compute_alone(node: NodeOnLoopback) -> None:
    node.compute(0, {1: torch.zeros(1, 64, dtype=torch.float16)})
    (failed,) = node.said(ComputeFailed)
    assert isinstance(failed, ComputeFailed)
    assert failed.code == "bad_request"
    assert node.agent.state.used_slots == 0
    node.compute(0, rows_for({1: 1}), request_id=1)
    assert len(node.said(Result)) == 1
