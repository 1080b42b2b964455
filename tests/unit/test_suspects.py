"""Who gets no new work for a while: late, silent, and everyone when nobody else is left. Pure, no sleep."""

import pytest

from odmoe_server.cluster.events import CallRequested, LayerCall, PartDone, PeerMessage, SendCompute, TimePassed
from odmoe_server.cluster.peers import SILENT_HEARTBEATS, ClusterConfig
from odmoe_server.cluster.state import ClusterState
from odmoe_server.cluster.suspects import MOST_AWAY_S, Suspects
from odmoe_wire.messages import ExpertTiming, Heartbeat, Hello, Member, Result, Span

MEMBERS = [Member(name, 1) for name in ("a", "b", "c")]
CONFIG = ClusterConfig(store_digest="d", package_version="1", num_layers=4, num_experts=8, group_size=2)
SILENCE_S = SILENT_HEARTBEATS * CONFIG.heartbeat_s


class TestSuspects:
    @pytest.fixture
    def suspects(self) -> Suspects:
        return Suspects(first_away_s=0.5)

    def test_a_late_one_is_away_for_longer_each_time_until_it_is_in_time(self, suspects: Suspects) -> None:
        now, away = 10.0, []
        for _ in range(7):
            suspects.was_late("a", now)
            suspects.was_late("a", now)  # of several requests that were under way together
            length_s = next(s / 4 for s in range(1, 100) if not suspects.among(MEMBERS, now + s / 4))
            away.append(length_s)
            now += length_s
        assert away == [0.5, 1.0, 2.0, 4.0, MOST_AWAY_S, MOST_AWAY_S, MOST_AWAY_S]
        suspects.was_in_time("a")
        suspects.was_late("a", now)
        assert suspects.among(MEMBERS, now + 0.4) == {"a"}
        assert not suspects.among(MEMBERS, now + 0.5)

    def test_what_was_meant_for_them_goes_to_who_has_least_to_do_of_the_group(self, suspects: Suspects) -> None:
        suspects.are_silent(["a"])
        assigned = {0: "a", 1: "b", 2: "a", 3: "c"}
        assert suspects.spared(assigned, MEMBERS, group=MEMBERS[:2], now=0.0) == {0: "b", 1: "b", 2: "b", 3: "c"}
        assert suspects.spared(assigned, MEMBERS, group=MEMBERS[:1], now=0.0) == {0: "b", 1: "b", 2: "c", 3: "c"}

    def test_with_nobody_else_they_work(self, suspects: Suspects) -> None:
        suspects.are_silent(["a", "b", "c"])
        assert suspects.spared({0: "a"}, MEMBERS, group=MEMBERS, now=0.0) == {0: "a"}


class TestInTheCluster:
    @pytest.fixture
    def cluster(self) -> ClusterState:
        state = ClusterState(config=CONFIG)
        for name in ("a", "b", "c"):
            hello = Hello(
                role="node", peer_id=name, incarnation=1, package_version="1", store_digest="d", slots=1, budget_bytes=1
            )
            state.handle(PeerMessage(peer_id=name, epoch=0, message=hello), 0.0)
        return state

    def call(self, state: ClusterState, call_id: int, now: float) -> list[SendCompute]:
        wanted = LayerCall(call_id=call_id, spans=(Span(7, call_id),), layer=0, counts={1: 1, 4: 1})
        return [a for a in state.handle(CallRequested(call=wanted), now) if isinstance(a, SendCompute)]

    def hear(self, state: ClusterState, names: str, now: float) -> None:
        for name in names:
            state.handle(PeerMessage(peer_id=name, epoch=3, message=Heartbeat(count=1)), now)

    def answer(self, state: ClusterState, sent: SendCompute, now: float) -> bool:
        timings = [ExpertTiming(expert, "hit", 0.0, 0.001) for expert in sent.message.experts]
        result = Result(request_id=sent.message.request_id, layer=0, timings=timings)
        actions = state.handle(PeerMessage(peer_id=sent.peer_id, epoch=3, message=result), now)
        return any(isinstance(action, PartDone) for action in actions)

    def test_a_silent_node_loses_its_work_long_before_it_is_given_up_and_gets_no_new_one(
        self, cluster: ClusterState
    ) -> None:
        sent = {send.peer_id: send for send in self.call(cluster, 1, 0.0)}
        assert len(sent) == 2
        silent, other = sent
        self.answer(cluster, sent[other], 0.1)
        self.hear(cluster, "".join({"a", "b", "c"} - {silent}), SILENCE_S)
        actions = cluster.handle(TimePassed(), SILENCE_S)
        (again,) = [action for action in actions if isinstance(action, SendCompute)]
        assert again.message.experts == sent[silent].message.experts
        assert again.peer_id != silent
        assert silent not in {send.peer_id for send in self.call(cluster, 2, SILENCE_S)}
        self.hear(cluster, silent, SILENCE_S + 1.0)
        self.hear(cluster, other, SILENCE_S + 1.0)
        cluster.handle(TimePassed(), SILENCE_S + 1.0)
        assert silent in {send.peer_id for send in self.call(cluster, 3, SILENCE_S + 1.0)}

    def test_a_request_is_asked_again_as_often_as_it_is_lost(self, cluster: ClusterState) -> None:
        """Once, a second try that was lost too left the call to its deadline."""
        (first, *_) = self.call(cluster, 1, 0.0)
        asked, now = 1, 0.0
        while asked < 6:
            now += 0.25
            assert now < 20.0, "nobody was asked any more"
            self.hear(cluster, "abc", now)
            sends = [a for a in cluster.handle(TimePassed(), now) if isinstance(a, SendCompute)]
            again = [send for send in sends if send.message.experts == first.message.experts]
            asked += len(again)
        assert self.answer(cluster, again[-1], now)

    def test_one_slow_node_among_several_does_not_teach_patience(self, cluster: ClusterState) -> None:
        """Its answers take 0.8 s; were they taken for what is usual, each layer would wait for them."""
        now, late = 0.0, 0
        for call_id in range(1, 60):
            sent = self.call(cluster, call_id, now)
            for one in [one for one in sent if one.peer_id != "a"]:
                self.answer(cluster, one, now + 0.005)
            slow = [one for one in sent if one.peer_id == "a"]
            now += 0.65 if slow else 0.005
            self.hear(cluster, "abc", now)
            again = [a for a in cluster.handle(TimePassed(), now) if isinstance(a, SendCompute)]
            assert len(again) == len(slow), "its share is late"
            for one in again:
                self.answer(cluster, one, now + 0.005)
            late += len(again)
        assert 0 < late < 15, "and it gets less and less"

    def test_an_answer_is_late_soon_where_answers_come_soon_and_a_loss_costs_one_short_wait(
        self, cluster: ClusterState
    ) -> None:
        for call_id in range(1, 5):
            for one in self.call(cluster, call_id, 1.0):
                self.answer(cluster, one, 1.005)
        lost, *_ = self.call(cluster, 9, 1.1)
        late_s = 1.1 + CONFIG.compute_least_s
        assert not [a for a in cluster.handle(TimePassed(), late_s) if isinstance(a, SendCompute)]
        self.hear(cluster, "abc", late_s)
        again = [a for a in cluster.handle(TimePassed(), late_s + 0.05) if isinstance(a, SendCompute)]
        assert lost.message.experts in [one.message.experts for one in again]
        assert lost.peer_id not in {one.peer_id for one in self.call(cluster, 10, late_s + 0.05)}, "no second wait"

    def test_what_two_have_not_answered_for_is_asked_of_two_at_once(self, cluster: ClusterState) -> None:
        first, *_ = self.call(cluster, 1, 0.0)
        waves, now = [], 0.0
        while len(waves) < 3:
            now += 0.05
            self.hear(cluster, "abc", now)
            sends = [a for a in cluster.handle(TimePassed(), now) if isinstance(a, SendCompute)]
            again = [send.peer_id for send in sends if send.message.experts == first.message.experts]
            waves += [again] if again else []
        assert [len(set(wave)) for wave in waves] == [1, 2, 2]

    def test_a_node_alone_is_not_asked_twice_at_once(self) -> None:
        alone = ClusterState(config=CONFIG)
        hello = Hello(
            role="node", peer_id="a", incarnation=1, package_version="1", store_digest="d", slots=1, budget_bytes=1
        )
        alone.handle(PeerMessage(peer_id="a", epoch=0, message=hello), 0.0)
        self.call(alone, 1, 0.0)
        for tick in range(1, 80):
            self.hear(alone, "a", 0.05 * tick)
            assert len([a for a in alone.handle(TimePassed(), 0.05 * tick) if isinstance(a, SendCompute)]) <= 1

    def test_when_we_stood_still_ourselves_nobody_is_late_silent_or_lost(self, cluster: ClusterState) -> None:
        sent = self.call(cluster, 1, 0.0)
        stood_still_s = 2.0 * CONFIG.lost_after_s
        actions = cluster.handle(TimePassed(late_s=stood_still_s), stood_still_s)
        assert not [action for action in actions if isinstance(action, SendCompute)]
        assert set(cluster.peers.admitted) == {"a", "b", "c"}
        assert not cluster.dispatch.suspects.among(MEMBERS, stood_still_s)
        assert all(self.answer(cluster, one, stood_still_s + 0.01) for one in sent)
        (lost, *_) = self.call(cluster, 2, stood_still_s + 0.02)
        late_s = stood_still_s + 0.02 + CONFIG.compute_floor_s + 0.01
        self.hear(cluster, "abc", late_s)
        again = [a for a in cluster.handle(TimePassed(), late_s) if isinstance(a, SendCompute)]
        assert lost.message.experts in [one.message.experts for one in again], "but whoever is late after that"
