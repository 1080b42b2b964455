"""Who computes what: forecasts used, wrong forecasts released, late and lost requests sent again. Pure, no sleep."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from odmoe_server.cluster.dispatch import assign
from odmoe_server.cluster.events import (
    Action,
    CallFailed,
    CallRequested,
    LayerCall,
    Note,
    PartDone,
    PeerMessage,
    PeerUnreachable,
    Send,
    SendCompute,
    SequenceEnded,
    TimePassed,
)
from odmoe_server.cluster.peers import ClusterConfig, Peers
from odmoe_server.cluster.state import ClusterState
from odmoe_wire.messages import (
    AnyMessage,
    Bye,
    Cancel,
    ComputeFailed,
    End,
    ExpertTiming,
    Heartbeat,
    Hello,
    Load,
    Member,
    Refused,
    Release,
    Result,
    Schedule,
    Span,
    View,
    Welcome,
    Withdraw,
)
from odmoe_wire.placement import place

CONFIG = ClusterConfig(
    store_digest="d1", package_version="1", num_layers=4, num_experts=8, group_size=2, lost_after_s=1.5
)
NODES = ("n0", "n1", "n2", "n3")
MEMBERS = [Member(node_id, 1) for node_id in NODES]


def hello(peer_id: str, *, role: str = "node", incarnation: int = 1, digest: str = "d1", version: str = "1") -> Hello:
    return Hello(
        role=role,  # type: ignore[arg-type]
        peer_id=peer_id,
        incarnation=incarnation,
        package_version=version,
        store_digest=digest,
        slots=1 if role == "node" else 0,
        budget_bytes=1,
    )


def say(
    state: ClusterState, peer_id: str, message: AnyMessage, *, now: float, epoch: int | None = None
) -> list[Action]:
    epoch = state.peers.epoch if epoch is None else epoch
    return state.handle(PeerMessage(peer_id=peer_id, epoch=epoch, message=message), now)


@pytest.fixture
def cluster() -> ClusterState:
    state = ClusterState(config=CONFIG)
    for node_id in NODES:
        say(state, node_id, hello(node_id), now=0.0)
    say(state, "p", hello("p", role="predictor"), now=0.0)
    return state


def call(
    call_id: int = 1, *, layer: int = 0, counts: Mapping[int, int], position: int = 5, length: int = 1, **more: Any
) -> CallRequested:
    spans = (Span(7, position, length),)
    return CallRequested(call=LayerCall(call_id=call_id, spans=spans, layer=layer, counts=counts, **more))


def computes(actions: Iterable[Action]) -> dict[str, list[int]]:
    """What each node is to compute, in however many messages."""
    by_node: dict[str, list[int]] = {}
    for action in only(actions):
        by_node.setdefault(action.peer_id, []).extend(action.message.experts)
    return by_node


def messages_to(actions: Iterable[Action], kind: type) -> list[str]:
    return [a.peer_id for a in actions if isinstance(a, Send) and isinstance(a.message, kind)]


def answer(state: ClusterState, sent: SendCompute, *, now: float) -> list[Action]:
    timings = [ExpertTiming(expert, "hit", 0.0, 0.001) for expert in sent.message.experts]
    result = Result(request_id=sent.message.request_id, layer=sent.message.layer, timings=timings)
    return say(state, sent.peer_id, result, now=now)


def only(actions: Iterable[Action], kind: type[SendCompute] = SendCompute) -> list[SendCompute]:
    return [action for action in actions if isinstance(action, kind)]


class TestAssign:
    def test_a_right_forecast_is_computed_where_it_was_loaded(self) -> None:
        wanted = LayerCall(call_id=1, spans=(Span(7, 5),), layer=1, counts={3: 1, 6: 1})
        assert assign(wanted, [frozenset({3, 6})], MEMBERS, CONFIG) == place(1, {3, 6}, MEMBERS, 2)

    def test_only_the_wrong_expert_moves_and_it_goes_to_the_worker_whose_forecast_was_wrong(self) -> None:
        forecast = place(0, {3, 6}, MEMBERS, 2)
        got = assign(
            LayerCall(call_id=1, spans=(Span(7, 5),), layer=0, counts={3: 1, 0: 1}),
            [frozenset({3, 6})],
            MEMBERS,
            CONFIG,
        )
        assert got == {3: forecast[3], 0: forecast[6]}

    def test_without_a_forecast_a_token_stays_in_its_group_and_a_prompt_is_dealt_round_all(self) -> None:
        token = LayerCall(call_id=1, spans=(Span(7, 5),), layer=1, counts={3: 1, 6: 1})
        prompt = LayerCall(
            call_id=1, spans=(Span(7, 0, 9),), layer=1, counts=dict.fromkeys(range(8), 2), is_prompt=True
        )
        assert set(assign(token, [], MEMBERS, CONFIG).values()) == {"n2", "n3"}
        dealt = list(assign(prompt, [], MEMBERS, CONFIG).values())
        assert {node_id: dealt.count(node_id) for node_id in NODES} == dict.fromkeys(NODES, 2)

    def test_nobody_there(self) -> None:
        assert assign(LayerCall(call_id=1, spans=(Span(7, 5),), layer=0, counts={3: 1}), [], [], CONFIG) == {}


def test_a_call_is_done_when_all_its_experts_came(cluster: ClusterState) -> None:
    first, second = only(cluster.handle(call(counts={1: 1, 4: 1}), 1.0))
    (part,) = answer(cluster, first, now=1.1)
    assert isinstance(part, PartDone)
    assert not part.last
    (part,) = answer(cluster, second, now=1.2)
    assert isinstance(part, PartDone)
    assert part.last
    assert not cluster.dispatch.calls
    assert not cluster.dispatch.requests


def test_wrong_forecasts_are_released_and_right_ones_used(cluster: ClusterState) -> None:
    say(cluster, "p", Schedule(span=Span(7, 5), layer=0, experts=[2, 3]), now=1.0)
    actions = cluster.handle(call(counts={2: 2}), 1.0)
    assert computes(actions) == {"n0": [2]}
    assert messages_to(actions, Release) == ["n1"]


def test_a_forecast_that_comes_after_the_gate_is_judged_and_not_used(cluster: ClusterState) -> None:
    cluster.handle(call(counts={2: 1, 5: 1}), 1.0)
    assert say(cluster, "p", Schedule(span=Span(7, 5), layer=0, experts=[2, 3]), now=1.1) == []
    assert cluster.dispatch.predicted_late_total == 1
    assert not cluster.dispatch.forecasts


def test_an_expert_counts_as_forecast_once(cluster: ClusterState) -> None:
    """A shadow that ran ahead on a wrong token forecasts the position again when it knows better."""
    say(cluster, "p", Schedule(span=Span(7, 5), layer=0, experts=[2, 3]), now=1.0)
    cluster.handle(call(counts={2: 1, 5: 1}), 1.0)
    for _ in range(2):
        say(cluster, "p", Schedule(span=Span(7, 5), layer=0, experts=[2, 5]), now=1.1)
    assert cluster.dispatch.predicted_late_total == 1


def test_the_newest_forecast_of_a_position_counts(cluster: ClusterState) -> None:
    say(cluster, "p", Schedule(span=Span(7, 5), layer=0, experts=[2, 3]), now=1.0)
    say(cluster, "p", Schedule(span=Span(7, 5), layer=0, experts=[4, 6]), now=1.1)
    assert cluster.dispatch.predicted((Span(7, 5),), 0) == {4, 6}


def test_a_forecast_for_a_sequence_that_is_over_is_not_kept(cluster: ClusterState) -> None:
    cluster.handle(call(counts={2: 1}, position=5), 1.0)
    cluster.handle(SequenceEnded(sequence=7), 1.1)
    say(cluster, "p", Schedule(span=Span(7, 6), layer=0, experts=[2]), now=1.2)
    assert not cluster.dispatch.forecasts


def test_a_forecast_of_an_older_view_does_not_count(cluster: ClusterState) -> None:
    say(cluster, "p", Schedule(span=Span(7, 5), layer=0, experts=[2, 3]), now=1.0, epoch=cluster.peers.epoch - 1)
    assert cluster.dispatch.predicted((Span(7, 5),), 0) == frozenset()
    assert cluster.stale_total == 1


def test_a_node_may_not_forecast(cluster: ClusterState) -> None:
    say(cluster, "n0", Schedule(span=Span(7, 5), layer=0, experts=[2, 3]), now=1.0)
    assert cluster.dispatch.predicted((Span(7, 5),), 0) == frozenset()


def test_forecasts_of_passed_positions_and_ended_sequences_are_forgotten(cluster: ClusterState) -> None:
    say(cluster, "p", Schedule(span=Span(7, 4), layer=0, experts=[2]), now=1.0)
    say(cluster, "p", Schedule(span=Span(7, 5), layer=0, experts=[2]), now=1.0)
    cluster.handle(call(counts={2: 1}, position=5), 1.0)
    assert list(cluster.dispatch.forecasts) == [(7, 5)]
    actions = cluster.handle(SequenceEnded(sequence=7), 1.1)
    assert not cluster.dispatch.forecasts
    assert messages_to(actions, Cancel) == list(NODES)
    assert messages_to(actions, End) == ["p"]


def test_what_a_lost_node_had_in_hand_goes_to_another(cluster: ClusterState) -> None:
    first, second = only(cluster.handle(call(counts={1: 1, 4: 1}), 1.0))
    again = only(cluster.handle(PeerUnreachable(peer_id=first.peer_id), 1.1))
    assert [a.message.experts for a in again] == [first.message.experts]
    assert again[0].peer_id != first.peer_id
    answer(cluster, second, now=1.2)
    (part,) = answer(cluster, again[0], now=1.3)
    assert isinstance(part, PartDone)
    assert part.last
    assert cluster.dispatch.failovers_total == 1


def test_a_silent_node_is_lost_and_a_late_answer_is_dropped(cluster: ClusterState) -> None:
    sent = only(cluster.handle(call(counts={1: 1}), 1.0))[0]
    for now in (1.2, 2.0, 2.6):
        for node_id in set(NODES) - {sent.peer_id}:
            say(cluster, node_id, Heartbeat(count=1), now=now)
    again = only(cluster.handle(TimePassed(), 2.61))
    assert [a.message.experts for a in again] == [[1]]
    assert sent.peer_id not in cluster.peers.admitted
    answer(cluster, again[0], now=2.7)
    assert messages_to(answer(cluster, sent, now=2.8), Bye) == [sent.peer_id]


def test_a_late_request_is_hedged_and_the_first_answer_wins(cluster: ClusterState) -> None:
    sent = only(cluster.handle(call(counts={1: 1}), 1.0))[0]
    late = 1.0 + CONFIG.compute_floor_s + 0.01
    for node_id in NODES:
        say(cluster, node_id, Heartbeat(count=1), now=late)
    (hedge,) = only(cluster.handle(TimePassed(), late))
    assert hedge.peer_id != sent.peer_id
    part, withdrawal = answer(cluster, sent, now=late + 0.1)
    assert isinstance(part, PartDone)
    assert part.last
    withdraw = Withdraw(request_id=hedge.message.request_id)
    assert withdrawal == Send(peer_id=hedge.peer_id, message=withdraw, epoch=cluster.peers.epoch)
    assert answer(cluster, hedge, now=late + 0.2) == []
    assert cluster.dispatch.duplicates_total == 1


def test_who_is_late_with_part_of_a_call_is_spared_while_the_rest_goes_on(cluster: ClusterState) -> None:
    """Two nodes are late, and others are asked too: with one of their answers one who is late works for nothing."""
    sent = only(cluster.handle(call(counts={1: 1, 2: 1}), 1.0))
    late = 1.0 + CONFIG.compute_floor_s + 0.01
    for node_id in NODES:
        say(cluster, node_id, Heartbeat(count=1), now=late)
    first, _second = only(cluster.handle(TimePassed(), late))
    part, *withdrawals = answer(cluster, first, now=late + 0.1)
    assert isinstance(part, PartDone)
    assert not part.last
    (loser,) = [each for each in sent if each.message.experts == first.message.experts]
    assert [(each.peer_id, each.message) for each in withdrawals if isinstance(each, Send)] == [
        (loser.peer_id, Withdraw(request_id=loser.message.request_id))
    ]
    assert len(cluster.dispatch.requests) == 2, "the other expert's, asked for twice"


def test_a_refused_request_goes_to_another_node(cluster: ClusterState) -> None:
    sent = only(cluster.handle(call(counts={1: 1}), 1.0))[0]
    failed = ComputeFailed(request_id=sent.message.request_id, code="load_failed", reason="bad sector")
    (again,) = only(say(cluster, sent.peer_id, failed, now=1.1))
    assert again.peer_id != sent.peer_id
    assert again.message.request_id != sent.message.request_id


def test_a_call_waits_for_a_node_and_fails_at_its_deadline() -> None:
    state = ClusterState(config=CONFIG)
    assert state.handle(call(1, counts={1: 1}), 0.0) == []
    say(state, "n0", hello("n0"), now=1.0)
    assert computes(state.handle(TimePassed(), 1.1)) == {"n0": [1]}
    state = ClusterState(config=CONFIG)
    state.handle(call(1, counts={1: 1}), 0.0)
    (failed,) = state.handle(TimePassed(), CONFIG.call_timeout_s)
    assert isinstance(failed, CallFailed)
    assert not state.dispatch.calls


def test_results_nobody_asked_for_are_dropped(cluster: ClusterState) -> None:
    sent = only(cluster.handle(call(counts={1: 1}), 1.0))[0]
    stranger = next(node_id for node_id in NODES if node_id != sent.peer_id)
    assert say(cluster, stranger, Result(request_id=sent.message.request_id, layer=0, timings=[]), now=1.1) == []
    assert say(cluster, stranger, Result(request_id=999, layer=0, timings=[]), now=1.1) == []
    assert cluster.dispatch.duplicates_total == 2
    assert cluster.dispatch.calls


class TestPeers:
    def test_each_change_makes_a_new_epoch_and_everybody_hears_of_it(self, cluster: ClusterState) -> None:
        epoch = cluster.peers.epoch
        actions = cluster.handle(PeerUnreachable(peer_id="n1"), 1.0)
        views = [a for a in actions if isinstance(a, Send) and isinstance(a.message, View)]
        assert {a.peer_id for a in views} == {"n0", "n2", "n3", "p"}
        assert {a.epoch for a in views} == {epoch + 1}
        assert [m.node_id for m in views[0].message.members] == ["n0", "n2", "n3"]  # type: ignore[union-attr]

    @pytest.mark.parametrize(
        ("wrong", "named"),
        [
            (hello("x", digest="d2"), "digest"),
            (hello("x", version="2"), "odmoe 2"),
            (hello("y"), "'y'"),
            (hello("x", role="predictor"), "predictor already"),
        ],
    )
    def test_who_does_not_fit_is_refused_and_told_why(self, cluster: ClusterState, wrong: Hello, named: str) -> None:
        epoch = cluster.peers.epoch
        (refusal, _) = say(cluster, "x", wrong, now=1.0)
        assert isinstance(refusal, Send)
        assert isinstance(refusal.message, Refused)
        assert named in refusal.message.reason
        assert cluster.peers.epoch == epoch

    def test_with_keys_a_nodes_key_does_not_make_a_predictor(self) -> None:
        peers = Peers(config=replace(CONFIG, predictor_id="predictor"))
        (refusal, _) = peers.admit("n1", hello("n1", role="predictor"), 0.0)
        assert isinstance(refusal, Send)
        assert isinstance(refusal.message, Refused)
        assert "the key of 'n1'" in refusal.message.reason
        assert peers.predictor() is None
        peers.admit("predictor", hello("predictor", role="predictor"), 0.0)
        assert peers.predictor() is not None

    def test_a_repeated_hello_changes_nothing(self, cluster: ClusterState) -> None:
        epoch = cluster.peers.epoch
        actions = say(cluster, "n0", hello("n0"), now=1.0)
        assert messages_to(actions, Welcome) == ["n0"]
        assert messages_to(actions, View) == ["n0"]
        assert cluster.peers.epoch == epoch

    def test_whose_life_signs_tell_of_an_older_view_hears_the_newest_again(self, cluster: ClusterState) -> None:
        """A node that never got its first view would drop every compute, and be alive for all that."""
        epoch = cluster.peers.epoch
        assert messages_to(say(cluster, "n1", Heartbeat(count=1), now=1.0, epoch=0), View) == ["n1"]
        assert messages_to(say(cluster, "p", Heartbeat(count=1), now=1.0, epoch=epoch - 1), View) == ["p"]
        assert say(cluster, "n1", Heartbeat(count=2), now=1.1) == []

    def test_a_restarted_node_is_a_new_one_and_its_old_work_moves(self, cluster: ClusterState) -> None:
        sent = only(cluster.handle(call(counts={1: 1}), 1.0))[0]
        actions = say(cluster, sent.peer_id, hello(sent.peer_id, incarnation=2), now=1.1)
        assert [a.message.experts for a in only(actions)] == [[1]]
        assert messages_to(actions, Welcome) == [sent.peer_id]
        assert cluster.peers.rejoins_total == 1

    def test_who_is_not_admitted_is_told_to_say_hello(self, cluster: ClusterState) -> None:
        assert messages_to(say(cluster, "ghost", Heartbeat(count=3), now=1.0), Bye) == ["ghost"]

    def test_life_signs_go_out_to_busy_and_idle_alike(self, cluster: ClusterState) -> None:
        cluster.handle(call(counts={1: 1}), 0.1)
        beats = messages_to(cluster.handle(TimePassed(), 0.3), Heartbeat)
        assert sorted(beats) == ["n0", "n1", "n2", "n3", "p"]
        assert messages_to(cluster.handle(TimePassed(), 0.31), Heartbeat) == []


class TestLoadAhead:
    def loads(self, actions: Iterable[Action]) -> dict[str, list[int]]:
        sends = [a for a in actions if isinstance(a, Send) and isinstance(a.message, Load)]
        assert all(a.message.layer == 1 for a in sends)  # type: ignore[union-attr]
        return {a.peer_id: a.message.experts for a in sends}  # type: ignore[union-attr]

    def test_a_long_prompt_loads_the_next_layer_where_it_will_be_computed(self, cluster: ClusterState) -> None:
        actions = cluster.handle(call(counts=dict.fromkeys(range(8), 4), position=0, length=16, is_prompt=True), 1.0)
        ahead = self.loads(actions)
        assert sorted(expert for experts in ahead.values() for expert in experts) == list(range(8))
        following = cluster.handle(
            call(2, layer=1, counts=dict.fromkeys((0, 3, 5, 6), 4), position=0, length=16, is_prompt=True), 1.1
        )
        for node_id, experts in computes(following).items():
            assert set(experts) <= set(ahead[node_id])

    @pytest.mark.parametrize(
        "request_",
        [
            call(counts={1: 1, 4: 1}),
            call(counts=dict.fromkeys(range(3), 1), position=0, length=2, is_prompt=True),
            call(counts=dict.fromkeys(range(8), 4), layer=3, position=0, length=16, is_prompt=True),
        ],
        ids=["a decode step", "a short prompt", "the last layer"],
    )
    def test_nothing_is_loaded_ahead_for(self, cluster: ClusterState, request_: CallRequested) -> None:
        assert self.loads(cluster.handle(request_, 1.0)) == {}


class TestOneNodeAlone:
    def warnings(self, state: ClusterState, *, until_s: float, heard: Iterable[str]) -> list[str]:
        """What is said in the log while these give signs of life."""
        found, now = [], 1.0
        while now < until_s:
            for node_id in heard:
                say(state, node_id, Heartbeat(count=1), now=now)
            notes = [each for each in state.handle(TimePassed(), now) if isinstance(each, Note)]
            found += [note.text for note in notes if "every layer has one node" in note.text]
            now += 0.25
        return found

    def test_it_is_said_once_and_only_after_others_had_time_to_come(self) -> None:
        state = ClusterState(config=CONFIG)
        say(state, "a", hello("a"), now=1.0)
        assert self.warnings(state, until_s=1.0 + CONFIG.lost_after_s, heard="a") == []
        (said,) = self.warnings(state, until_s=20.0, heard="a")
        assert "a" in said

    def test_with_two_nothing_is_said_until_one_is_gone(self) -> None:
        state = ClusterState(config=CONFIG)
        for node_id in "ab":
            say(state, node_id, hello(node_id), now=1.0)
        assert self.warnings(state, until_s=10.0, heard="ab") == []
        assert len(self.warnings(state, until_s=30.0, heard="a")) == 1
