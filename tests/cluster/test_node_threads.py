"""Node agents as threads of one process on real sockets."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import zmq

from odmoe_model.experts import ExpertMaths
from odmoe_model.store import ExpertStore
from odmoe_node.bank import SlotBank, open_bank
from odmoe_node.build import hello_of, limits_of
from odmoe_node.driver import NodeAgent, RefusedError
from odmoe_wire.link import DealerLink
from odmoe_wire.messages import (
    Bye,
    Cancel,
    ComputeFailed,
    Heartbeat,
    Hello,
    Load,
    Refused,
    Release,
    Result,
    SlotReport,
    Span,
    ToNode,
)
from support.node_banks import TroubledBank
from support.node_zmq import ScriptedServer, random_rows, rows_of
from support.stores import tiny_store

ENDPOINT = "inproc://server"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ExpertStore:
    return ExpertStore.open(tiny_store("mixtral", tmp_path_factory.mktemp("threads")), verify=False)


@pytest.fixture
def context() -> Iterator["zmq.Context[zmq.Socket[bytes]]"]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield context
    context.destroy(linger=0)


@pytest.fixture
def server(store: ExpertStore, context: "zmq.Context[zmq.Socket[bytes]]") -> Iterator[ScriptedServer]:
    server = ScriptedServer(ENDPOINT, store, context=context)
    yield server
    server.close()


@contextmanager
def running(
    store: ExpertStore,
    node_id: str,
    context: "zmq.Context[zmq.Socket[bytes]]",
    *,
    bank: SlotBank | None = None,
    slots: int = 2,
) -> Iterator[NodeAgent]:
    """An agent on a thread of its own that is told to stop at the end, and must."""
    bank = bank or open_bank(store, num_slots=slots, device="cpu")
    limits = limits_of(store.manifest)
    link = DealerLink.connect(ENDPOINT, identity=node_id, peer="server", context=context, accept=ToNode, limits=limits)
    hello = hello_of(store.manifest, node_id=node_id, slots=slots, budget_bytes=bank.arena_bytes)
    agent = NodeAgent(hello, bank=bank, server=link)
    thread = threading.Thread(target=agent.run, name=node_id, daemon=True)
    thread.start()
    try:
        yield agent
    finally:
        agent.stop()
        thread.join(30)
        assert not thread.is_alive()


def test_several_agents_in_one_process_compute_and_say_goodbye(
    store: ExpertStore, server: ScriptedServer, context: "zmq.Context[zmq.Socket[bytes]]"
) -> None:
    maths = ExpertMaths(store.manifest)
    with running(store, "a", context), running(store, "b", context), running(store, "c", context):
        server.admit("a", "b", "c")
        for request_id in range(12):
            node_id, layer, expert = "abc"[request_id % 3], request_id % 3, request_id % 8
            x_NH = random_rows(1 + request_id % 2)
            server.compute(node_id, layer, expert, x_NH, request_id=request_id)
            _, received = server.expect(Result, node_id=node_id)
            fields = store.fields(store.record(layer, expert))
            assert torch.equal(rows_of(received), maths.rows(fields, x_NH))
        _, report = server.expect(SlotReport, node_id="a")
        assert isinstance(report.message, SlotReport)
        assert report.message.accounted_bytes == 0
    assert {server.expect(Bye)[0] for _ in range(3)} == {"a", "b", "c"}


def test_heartbeats_go_on_while_a_long_compute_runs_and_stop_waits_for_it(
    store: ExpertStore, server: ScriptedServer, context: "zmq.Context[zmq.Socket[bytes]]"
) -> None:
    bank = TroubledBank(open_bank(store, num_slots=2, device="cpu"))
    bank.compute_gate.clear()
    with running(store, "a", context, bank=bank) as agent:
        server.admit("a", heartbeat_s=0.01)
        server.compute("a", 0, 1, random_rows(1), request_id=1)
        assert bank.compute_began.wait(30)
        counts = [server.expect(Heartbeat)[1].message for _ in range(5)]
        assert counts == [Heartbeat(count=counts[0].count + i) for i in range(5)]  # type: ignore[union-attr]
        agent.stop()
        server.compute("a", 0, 2, random_rows(1), request_id=2)
        _, failed = server.expect(ComputeFailed)
        assert failed.message == ComputeFailed(request_id=2, code="cancelled", reason="the node is about to leave")
        bank.compute_gate.set()
        _, result = server.expect(Result)
        assert isinstance(result.message, Result)
        assert result.message.request_id == 1
        server.expect(Bye)


def test_a_load_nobody_wants_is_broken_off_for_the_one_a_compute_needs(
    store: ExpertStore, server: ScriptedServer, context: "zmq.Context[zmq.Socket[bytes]]"
) -> None:
    """It would never end by itself."""
    bank = TroubledBank(open_bank(store, num_slots=1, device="cpu"))
    bank.endless.add((0, 5))
    with running(store, "a", context, bank=bank, slots=1) as agent:
        server.admit("a")
        server.link.send("a", Load(spans=[Span(1, 0)], layer=0, experts=[5]), epoch=1)
        assert bank.endless_began.wait(30)
        server.link.send("a", Release(spans=[Span(1, 0)], layer=0), epoch=1)
        x_NH = random_rows(1)
        server.compute("a", 0, 3, x_NH, request_id=1)
        _, received = server.expect(Result)
        assert torch.equal(rows_of(received), ExpertMaths(store.manifest).rows(store.fields(store.record(0, 3)), x_NH))
        counters = agent.state.counters
        assert (counters.loads, counters.loads_broken_off) == (1, 1)
        assert counters.broken_off_s > 0
        assert agent.loop_errors == 0


def test_a_node_computes_while_it_loads(
    store: ExpertStore, server: ScriptedServer, context: "zmq.Context[zmq.Socket[bytes]]"
) -> None:
    """The load never ends; a compute whose expert is there does."""
    bank = TroubledBank(open_bank(store, num_slots=2, device="cpu"))
    bank.endless.add((1, 5))
    with running(store, "a", context, bank=bank):
        server.admit("a")
        server.link.send("a", Load(spans=[Span(1, 1)], layer=0, experts=[3]), epoch=1)
        server.link.send("a", Load(spans=[Span(1, 1)], layer=1, experts=[5]), epoch=1)
        assert bank.endless_began.wait(30)
        server.compute("a", 0, 3, random_rows(1), request_id=1)
        _, received = server.expect(Result)
        assert isinstance(received.message, Result)
        assert received.message.timings[0].outcome == "hit"
        server.link.send("a", Cancel(sequence=1), epoch=1)
        server.compute("a", 0, 4, random_rows(1), request_id=2)
        server.expect(Result)


def test_with_one_slot_short_computes_need_no_other_thread_and_with_two_they_have_one(
    store: ExpertStore, server: ScriptedServer, context: "zmq.Context[zmq.Socket[bytes]]"
) -> None:
    for node_id, slots in (("one", 1), ("two", 2)):
        bank = TroubledBank(open_bank(store, num_slots=slots, device="cpu"))
        with running(store, node_id, context, bank=bank, slots=slots):
            server.admit(node_id)
            for request_id in range(4):
                server.compute(node_id, 0, request_id, random_rows(1), request_id=request_id)
                server.expect(Result, node_id=node_id)
        server.expect(Bye)
        assert bank.computed_on[0] == f"{node_id}-compute", "how long it takes is not known yet"
        assert bank.computed_on[-1] == ("one" if slots == 1 else "two-compute")


def test_a_load_nobody_waits_for_is_found_by_whoever_comes_next(
    store: ExpertStore, server: ScriptedServer, context: "zmq.Context[zmq.Socket[bytes]]"
) -> None:
    bank = TroubledBank(open_bank(store, num_slots=1, device="cpu"))
    with running(store, "a", context, bank=bank, slots=1):
        server.admit("a", heartbeat_s=20.0)
        for request_id in range(8):
            server.link.send("a", Load(spans=[Span(1, request_id)], layer=0, experts=[request_id]), epoch=1)
            server.compute("a", 0, request_id, random_rows(1), request_id=request_id)
            _, received = server.expect(Result)
            assert isinstance(received.message, Result)
            assert received.message.timings[0].wait_s < 10.0, "it did not wait for a life sign"
            assert [loaded.expert for loaded in received.message.loaded] == [request_id]


def test_a_refusal_ends_the_agent_with_the_servers_reason(
    store: ExpertStore, server: ScriptedServer, context: "zmq.Context[zmq.Socket[bytes]]"
) -> None:
    bank = open_bank(store, num_slots=1, device="cpu")
    link = DealerLink.connect(
        ENDPOINT, identity="a", peer="server", context=context, accept=ToNode, limits=limits_of(store.manifest)
    )
    hello = hello_of(store.manifest, node_id="a", slots=1, budget_bytes=bank.arena_bytes)
    agent = NodeAgent(hello, bank=bank, server=link)
    reasons: list[str] = []

    def run() -> None:
        with pytest.raises(RefusedError) as refusal:
            agent.run()
        reasons.append(str(refusal.value))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    server.expect(Hello)
    server.link.send("a", Refused(reason="its store has another digest"), epoch=0)
    thread.join(30)
    assert reasons == ["its store has another digest"]
