"""What a node does when its own parts or its peers fail; loopback, virtual time, no sleeping."""

from pathlib import Path

import pytest
import torch

from odmoe_model.store import ExpertStore
from odmoe_node.bank import open_bank
from odmoe_wire.messages import ComputeFailed, Load, LoadFailed, Result, Span
from support.node_banks import TroubledBank
from support.node_loopback import LOST_AFTER_S, NodeOnLoopback
from support.stores import tiny_store


@pytest.fixture(scope="module")
def store_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_store("mixtral", tmp_path_factory.mktemp("faults"))


@pytest.fixture
def troubled(store_path: Path) -> tuple[NodeOnLoopback, TroubledBank]:
    bank = TroubledBank(open_bank(ExpertStore.open(store_path, verify=False), num_slots=2, device="cpu"))
    return NodeOnLoopback(store_path, num_slots=2, bank=bank), bank


ROW = {3: torch.ones(1, 64)}


def test_an_unreadable_expert_fails_its_computes_and_can_be_tried_again(
    troubled: tuple[NodeOnLoopback, TroubledBank],
) -> None:
    node, bank = troubled
    bank.unreadable.add((0, 3))
    node.compute(0, {2: torch.ones(1, 64), **ROW}, request_id=1)
    (failed,) = node.said(ComputeFailed)
    assert isinstance(failed, ComputeFailed)
    assert failed.code == "load_failed"
    assert "Input/output error" in failed.reason
    assert len(node.said(LoadFailed)) == 1
    assert node.agent.state.used_slots == 0
    assert node.agent.report().loads_failed_total == 1
    bank.unreadable.clear()
    node.compute(0, ROW, request_id=2)
    assert len(node.said(Result)) == 1


def test_an_unreadable_forecast_hurts_nobody(troubled: tuple[NodeOnLoopback, TroubledBank]) -> None:
    node, bank = troubled
    bank.unreadable.add((0, 5))
    node.forecast(0, [5])
    assert len(node.said(LoadFailed)) == 1
    assert node.agent.state.used_slots == 0
    node.compute(0, ROW)
    assert len(node.said(Result)) == 1


def test_a_restarted_server_gets_no_answers_to_its_predecessors_computes(store_path: Path) -> None:
    node = NodeOnLoopback(store_path, num_slots=2)
    node.compute(0, ROW, request_id=7)
    node.network.cut("n", "server")
    node.advance(LOST_AFTER_S)
    node.network.heal("n", "server")
    node.advance(1.0)
    node.compute(0, ROW, request_id=7)
    assert len(node.said(Result)) == 1, "not welcomed yet: meant for a former incarnation"
    node.welcome(epoch=1)
    node.compute(0, ROW, request_id=7)
    assert len(node.said(Result)) == 2


def test_a_result_that_cannot_be_sent_frees_its_slot_all_the_same(store_path: Path) -> None:
    node = NodeOnLoopback(store_path, num_slots=2)
    node.network.link_fault("n", "server", cut=True)
    node.compute(0, ROW)
    assert node.said(Result) == []
    assert node.agent.undelivered >= 1
    assert node.agent.state.used_slots == 0
    assert node.agent.state.num_requests == 0


def test_a_late_compute_is_still_served_when_nothing_else_was_heard(store_path: Path) -> None:
    node = NodeOnLoopback(store_path, num_slots=2)
    node.network.link_fault("server", "n", delay_s=0.5)
    node.compute(0, ROW, ttl_s=0.1)
    assert node.said(Result) == []
    node.advance(0.5)
    assert len(node.said(Result)) == 1, "a ttl counts from arrival: clocks of two machines are never compared"


def test_nothing_is_held_after_a_storm_of_duplicates_and_drops(store_path: Path) -> None:
    node = NodeOnLoopback(store_path, num_slots=2)
    node.network.link_fault("server", "n", duplicate=lambda message: True)
    node.network.link_fault("predictor", "n", drop=lambda message: message.layer == 1)  # type: ignore[union-attr]
    for position in range(6):
        for layer in range(3):
            node.forecast(layer, [position % 8, (position + 1) % 8], position=position)
        for layer in range(3):
            node.tell(Load(spans=[Span(1, position)], layer=layer, experts=[7]))
            request_id = position * 3 + layer
            node.compute(layer, {7: torch.ones(1, 64), position % 7: ROW[3]}, request_id=request_id, position=position)
    assert len(node.said(Result)) == 18
    assert node.agent.state.counters.duplicates == 18
    assert node.agent.state.used_slots <= 2
    node.compute(2, ROW, request_id=99, position=50)
    assert node.agent.state.used_slots == 0
