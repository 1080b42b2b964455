"""How a prompt is given to nodes: what is loaded before its gates speak, chunk after chunk; rollback. Pure."""

from collections.abc import Iterable

import pytest

from odmoe_server.cluster.dispatch import PARCEL_ROWS
from odmoe_server.cluster.events import (
    Action,
    CallRequested,
    LayerCall,
    PeerMessage,
    PromptBegins,
    Send,
    SendCompute,
    SequenceEnded,
)
from odmoe_server.cluster.peers import ClusterConfig
from odmoe_server.cluster.state import ClusterState
from odmoe_wire.checks import Limits
from odmoe_wire.messages import ExpertTiming, Hello, Load, Release, Result, Rollback, Schedule, Span

CONFIG = ClusterConfig(
    store_digest="d1", package_version="1", num_layers=3, num_experts=8, group_size=2, top_k=2, lost_after_s=1.5
)
NODES = ("n0", "n1", "n2", "n3")
FIRST, SECOND = Span(7, 0, 16), Span(7, 16, 16)
ALL = tuple(range(8))


@pytest.fixture
def cluster() -> ClusterState:
    return joined(CONFIG)


def joined(config: ClusterConfig) -> ClusterState:
    state = ClusterState(config=config)
    for peer_id in (*NODES, "p"):
        hello = Hello(
            role="predictor" if peer_id == "p" else "node",
            peer_id=peer_id,
            incarnation=1,
            package_version="1",
            store_digest="d1",
            slots=1,
        )
        say(state, peer_id, hello)
    return state


def say(state: ClusterState, peer_id: str, message: object, *, now: float = 0.0) -> list[Action]:
    return state.handle(PeerMessage(peer_id=peer_id, epoch=state.peers.epoch, message=message), now)  # type: ignore[arg-type]


def gate(
    state: ClusterState,
    layer: int,
    *,
    experts: Iterable[int] = ALL,
    span: Span = FIRST,
    next_spans: tuple[Span, ...] = (SECOND,),
    is_prompt: bool = True,
    rows: int = PARCEL_ROWS,
) -> list[Action]:
    """The gate of a layer has spoken, for so many rows each."""
    counts = dict.fromkeys(experts, rows)
    call = LayerCall(
        call_id=layer + 1, spans=(span,), layer=layer, counts=counts, is_prompt=is_prompt, next_spans=next_spans
    )
    return state.handle(CallRequested(call=call), 1.0)


def loads(actions: Iterable[Action]) -> set[tuple[int, Span, int]]:
    """(layer, span, expert) of what is to be loaded."""
    sent = [action.message for action in actions if isinstance(action, Send) and isinstance(action.message, Load)]
    return {(message.layer, message.spans[0], expert) for message in sent for expert in message.experts}


def computes(actions: Iterable[Action]) -> list[SendCompute]:
    return [action for action in actions if isinstance(action, SendCompute)]


def released(actions: Iterable[Action]) -> list[str]:
    return [a.peer_id for a in actions if isinstance(a, Send) and isinstance(a.message, Release)]


def all_of(layer: int, span: Span) -> set[tuple[int, Span, int]]:
    return {(layer, span, expert) for expert in ALL}


def test_the_first_layer_of_a_long_prompt_is_loaded_before_its_gate_speaks(cluster: ClusterState) -> None:
    assert loads(cluster.handle(PromptBegins(spans=(FIRST,)), 0.5)) == all_of(0, FIRST)
    assert cluster.handle(PromptBegins(spans=(Span(8, 0, 2),)), 0.5) == []


def test_each_layer_loads_the_next_one_and_the_last_the_next_chunk(cluster: ClusterState) -> None:
    assert loads(gate(cluster, 0)) == all_of(1, FIRST)
    assert loads(gate(cluster, 2)) == all_of(0, SECOND)
    assert loads(gate(cluster, 2, span=SECOND, next_spans=())) == set()


def test_a_second_chunk_is_a_prompt_too(cluster: ClusterState) -> None:
    say(cluster, "p", Schedule(span=SECOND, layer=1, experts=[1, 2]))
    actions = gate(cluster, 1, span=SECOND, next_spans=())
    assert loads(actions) == all_of(2, SECOND)
    assert {a.peer_id for a in computes(actions)} == set(NODES), "dealt round all nodes, whatever was forecast"
    assert cluster.dispatch.calls[2].predicted == frozenset()
    as_decode = gate(cluster, 1, span=SECOND, next_spans=(), is_prompt=False)
    assert loads(as_decode) == set()


def test_an_expert_of_a_prompt_is_a_message_and_no_node_waits_for_anothers_second(cluster: ClusterState) -> None:
    sent = computes(gate(cluster, 0))
    assert all(len(a.message.experts) == 1 for a in sent)
    assert sorted(a.message.experts[0] for a in sent) == list(ALL)
    assert {a.peer_id for a in sent[: len(NODES)]} == set(NODES)
    for peer_id in NODES:
        own = [a.message.experts[0] for a in sent if a.peer_id == peer_id]
        assert own == sorted(own), "in the order in which they were told to be loaded"
    as_decode = computes(gate(cluster, 0, experts=(1, 2), span=Span(7, 40), is_prompt=False))
    assert len(as_decode) == 2


def test_experts_with_few_rows_share_a_message(cluster: ClusterState) -> None:
    two = computes(gate(cluster, 0, rows=PARCEL_ROWS // 2))
    assert sorted(len(a.message.experts) for a in two) == [2] * 4
    assert [sum(a.message.counts) for a in two] == [PARCEL_ROWS] * 4
    few = computes(gate(cluster, 1, rows=1))
    assert {a.peer_id for a in few} == set(NODES)
    assert len(few) == len(NODES)


def test_loads_follow_the_computes(cluster: ClusterState) -> None:
    actions = gate(cluster, 0)
    kinds = [isinstance(action, SendCompute) for action in actions]
    assert kinds == sorted(kinds, reverse=True)


def test_what_was_loaded_and_not_chosen_is_let_go(cluster: ClusterState) -> None:
    cluster.handle(PromptBegins(spans=(FIRST,)), 0.5)
    chosen = (0, 1, 2, 3, 4, 5, 7)
    where = {a.message.experts[0]: a.peer_id for a in computes(gate(cluster, 0))}
    cluster.handle(SequenceEnded(sequence=7), 1.0)
    cluster.handle(PromptBegins(spans=(FIRST,)), 1.1)
    actions = gate(cluster, 0, experts=chosen)
    assert released(actions) == [where[6]]
    assert released(gate(cluster, 1, experts=ALL)) == []
    cluster.handle(SequenceEnded(sequence=7), 1.2)
    assert released(gate(cluster, 0, experts=chosen)) == [], "nothing was told to be loaded"


def test_a_request_that_waits_behind_others_gets_more_time(cluster: ClusterState) -> None:
    for sent in computes(gate(cluster, 0)):
        timings = [ExpertTiming(sent.message.experts[0], "hit", 0.0, 0.5)]
        say(cluster, sent.peer_id, Result(request_id=sent.message.request_id, layer=0, timings=timings), now=2.0)
    assert cluster.dispatch.duplicates_total == 0
    second = computes(gate(cluster, 1))
    late_s: dict[str, list[float]] = {}
    for sent in second:
        late_s.setdefault(sent.peer_id, []).append(cluster.dispatch.requests[sent.message.request_id].late_s)
    assert all(first < then for first, then in late_s.values())


def test_a_rollback_voids_the_forecasts_from_its_position_on(cluster: ClusterState) -> None:
    for position in (40, 41, 42):
        say(cluster, "p", Schedule(span=Span(7, position), layer=0, experts=[1, 2]))
    say(cluster, "p", Schedule(span=Span(9, 41), layer=0, experts=[1, 2]))
    say(cluster, "n0", Rollback(sequence=7, position=40))
    assert len(cluster.dispatch.forecasts) == 4, "a node may not say so"
    say(cluster, "p", Rollback(sequence=7, position=41))
    assert sorted(cluster.dispatch.forecasts) == [(7, 40), (9, 41)]
    say(cluster, "p", Schedule(span=Span(7, 41), layer=0, experts=[3]))
    assert cluster.dispatch.predicted((Span(7, 41),), 0) == {3}


def test_a_rollback_of_an_older_view_does_not_count(cluster: ClusterState) -> None:
    say(cluster, "p", Schedule(span=Span(7, 41), layer=0, experts=[1]))
    stale = PeerMessage(peer_id="p", epoch=cluster.peers.epoch - 1, message=Rollback(sequence=7, position=0))
    cluster.handle(stale, 1.0)
    assert list(cluster.dispatch.forecasts) == [(7, 41)]
    assert cluster.stale_total == 1


def test_the_largest_chunk_of_the_widest_model_fits_into_a_message() -> None:
    largest_chunk, widest_hidden = 16384, 16384
    assert largest_chunk * widest_hidden * 4 <= Limits().max_blob_bytes


def test_where_slots_are_caches_an_expert_is_always_sought_in_one_place() -> None:
    cluster = joined(ClusterConfig(**{**vars(CONFIG), "mode": "lru"}))
    as_prompt = {a.message.experts[0]: a.peer_id for a in computes(gate(cluster, 1))}
    for pair in ((0, 1), (1, 6), (3, 7), (2, 5)):
        sent = computes(gate(cluster, 1, experts=pair, span=Span(7, 40), is_prompt=False))
        assert {expert: a.peer_id for a in sent for expert in a.message.experts} == {e: as_prompt[e] for e in pair}
