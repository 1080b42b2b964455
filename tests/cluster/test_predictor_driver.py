"""The predictor's driver on the loopback network: what it says to whom, what it forgets, what it survives."""

from collections.abc import Callable

import pytest

from odmoe_model.store import ExpertStore
from odmoe_predictor.passes import OnRouting
from odmoe_predictor.shadow import Shadow
from odmoe_predictor.switchboard import HELLO_EVERY_S, REBIRTH_EVERY_S, RefusedError
from odmoe_wire.messages import (
    Align,
    AnyMessage,
    Bye,
    End,
    Heartbeat,
    Hello,
    ProtocolErrorNotice,
    Refused,
    Routed,
    Span,
    Start,
    Welcome,
)
from odmoe_wire.placement import place
from support.predictor_plain import FullModel, PlainWeight, Routings
from support.predictor_rig import LOST_AFTER_S, PredictorRig
from support.stores import tiny_store

PROMPT = [3, 17, 99, 4, 56, 23, 8, 120, 77, 31, 5, 66, 12, 90]
NODES = ("n1", "n2", "n3", "n4")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ExpertStore:
    return ExpertStore.open(tiny_store("mixtral", tmp_path_factory.mktemp("mixtral")), verify=False)


@pytest.fixture
def shadow(store: ExpertStore) -> Shadow:
    return Shadow.load(store, quantize=PlainWeight)


@pytest.fixture
def rig(shadow: Shadow) -> PredictorRig:
    rig = PredictorRig(shadow, node_ids=NODES)
    rig.join()
    return rig


def hellos(rig: PredictorRig) -> list[Hello]:
    return [message for message in rig.took["server"] if isinstance(message, Hello)]


def kinds(messages: list[AnyMessage]) -> set[str]:
    return {type(message).__name__ for message in messages}


def forecast_at_server(rig: PredictorRig, position: int) -> Routings:
    schedules = rig.schedules("server")
    assert {schedule.span for schedule in schedules} <= {Span(1, position, 1)}
    return {schedule.layer: schedule.experts for schedule in schedules}


# ------------------------------------------------------------------------------------------- forecasts


def test_forecast_goes_whole_to_the_server_and_by_placement_to_the_nodes(rig: PredictorRig, store: ExpertStore) -> None:
    full, token = rig.started(store, PROMPT)
    rows = len(PROMPT)
    for _ in range(4):
        position = full.length
        rig.align(full, token, rows=rows)
        rig.pump()
        token, rows = full.step([token]), 1
        assert forecast_at_server(rig, position) == full.routings
        view = rig.predictor.switchboard._view
        expected = {
            (layer, expert, node_id)
            for layer, experts in full.routings.items()
            for expert, node_id in place(layer, experts, view.members, view.group_size).items()
        }
        assert expected == {
            (schedule.layer, expert, node_id)
            for node_id in NODES
            for schedule in rig.schedules(node_id)
            for expert in schedule.experts
        }
    assert set(rig.epochs) == {rig.epoch}
    assert rig.predictor.worker.counters.forecast == 4
    assert rig.predictor.switchboard.counters.unsent == 0


def test_layers_are_announced_one_by_one_as_the_routers_speak(
    rig: PredictorRig, store: ExpertStore, shadow: Shadow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the last layer's router has spoken, the first layer's schedule is at the nodes already."""
    full, token = rig.started(store, PROMPT)
    seen_before_last: list[int] = []
    forecast = shadow.forecast

    def watching(sequence: int, *, on_routing: OnRouting, is_stale: Callable[[], bool]) -> bool:
        def note(layer: int, experts: list[int]) -> None:
            if layer == store.manifest.num_moe_layers - 1:
                rig.predictor.switchboard.send_forecasts()
                rig._collect()
                seen_before_last.extend(schedule.layer for schedule in rig.schedules("server"))
            on_routing(layer, experts)

        return forecast(sequence, on_routing=note, is_stale=is_stale)

    monkeypatch.setattr(shadow, "forecast", watching)
    rig.align(full, token, rows=len(PROMPT))
    rig.pump()
    assert seen_before_last == list(range(store.manifest.num_moe_layers - 1))


def test_alignments_that_piled_up_are_taken_in_but_only_the_newest_is_forecast(
    rig: PredictorRig, store: ExpertStore
) -> None:
    full, token = rig.started(store, PROMPT)
    rows = len(PROMPT)
    for _ in range(5):
        rig.align(full, token, rows=rows)
        position = full.length
        token, rows = full.step([token]), 1
    rig.pump()
    assert forecast_at_server(rig, position) == full.routings
    counters = rig.predictor.worker.counters
    assert (counters.forecast, counters.skipped, counters.abandoned) == (1, 4, 0)


def test_forecast_under_way_is_given_up_for_a_newer_one(
    rig: PredictorRig, store: ExpertStore, shadow: Shadow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The full model is done with the step while the shadow is at its first layer."""
    full, token = rig.started(store, PROMPT)
    forecast = shadow.forecast
    routed: list[int] = []

    def overtaken(sequence: int, *, on_routing: OnRouting, is_stale: Callable[[], bool]) -> bool:
        def note(layer: int, experts: list[int]) -> None:
            on_routing(layer, experts)
            routed.append(layer)
            if len(routed) == 1:
                rig.align(full, full.step([token]), rows=1)
                rig.predictor.switchboard.pump(rig.network.clock())

        return forecast(sequence, on_routing=note, is_stale=is_stale)

    monkeypatch.setattr(shadow, "forecast", overtaken)
    rig.align(full, token, rows=len(PROMPT))
    rig.pump()
    last_layer = store.manifest.num_moe_layers - 1
    assert routed == [0, *range(last_layer + 1)]
    counters = rig.predictor.worker.counters
    assert (counters.forecast, counters.abandoned) == (1, 1)
    newest = {schedule.layer: schedule.experts for schedule in rig.schedules("server")[1:]}
    full.step([newest_token(rig)])
    assert newest == full.routings


def test_alignments_without_tokens_that_piled_up_are_gone_through_one_by_one(
    rig: PredictorRig, store: ExpertStore
) -> None:
    """The shadow's own token at a position comes out of its forecast of the one before."""
    full, token = rig.started(store, PROMPT)
    rig.align(full, token, rows=len(PROMPT))
    for _ in range(3):
        token = full.step([token])
        rig.say(Align(sequence=1, position=full.length, tokens=[], cache=[]))
    position = full.length
    rig.pump()
    full.step([token])
    newest = [schedule for schedule in rig.schedules("server") if schedule.span == Span(1, position, 1)]
    assert {schedule.layer: schedule.experts for schedule in newest} == full.routings
    counters = rig.predictor.worker.counters
    assert (counters.forecast, counters.skipped, counters.abandoned) == (4, 0, 0)


def test_forecast_that_the_next_own_token_needs_is_not_given_up(
    rig: PredictorRig, store: ExpertStore, shadow: Shadow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even when the full model is two steps further meanwhile and sends its own token again."""
    full, token = rig.started(store, PROMPT)
    tokens = [token]
    rig.align(full, token, rows=len(PROMPT))
    rig.say(Align(sequence=1, position=full.length + 1, tokens=[], cache=[]))
    forecast = shadow.forecast

    def overtaken(sequence: int, *, on_routing: OnRouting, is_stale: Callable[[], bool]) -> bool:
        def note(layer: int, experts: list[int]) -> None:
            on_routing(layer, experts)
            if len(tokens) == 1:
                tokens.append(full.step([tokens[-1]]))
                tokens.append(full.step([tokens[-1]]))
                rig.say(Align(sequence=1, position=full.length, tokens=tokens[-1:], cache=[]))
                rig.predictor.switchboard.pump(rig.network.clock())

        return forecast(sequence, on_routing=note, is_stale=is_stale)

    monkeypatch.setattr(shadow, "forecast", overtaken)
    rig.pump()
    position = full.length
    full.step(tokens[-1:])
    newest = [schedule for schedule in rig.schedules("server") if schedule.span == Span(1, position, 1)]
    assert {schedule.layer: schedule.experts for schedule in newest} == full.routings
    assert rig.predictor.worker.counters.failed == 0


def newest_token(rig: PredictorRig) -> int:
    """The token of the newest alignment the server sent."""
    aligns = [sent.message for sent in rig.network.story if isinstance(sent.message, Align)]
    return aligns[-1].tokens[0]


def test_end_is_obeyed(rig: PredictorRig, store: ExpertStore, shadow: Shadow) -> None:
    full, token = rig.started(store, PROMPT)
    rig.align(full, token, rows=len(PROMPT))
    rig.pump()
    assert shadow.length(1) == len(PROMPT) + 1
    rig.say(End(sequence=1))
    rig.pump()
    assert shadow.num_sequences == 0


# -------------------------------------------------------------------------------------------- membership


def test_hello_is_repeated_until_welcomed(shadow: Shadow) -> None:
    rig = PredictorRig(shadow)
    rig.pump()
    rig.pump(seconds=4 * HELLO_EVERY_S, alive=False)
    said = len(hellos(rig))
    assert 3 <= said <= 5
    assert len({hello.incarnation for hello in hellos(rig)}) == 1
    rig.say(Welcome(heartbeat_s=0.25, lost_after_s=1.5))
    rig.pump()
    rig.pump(seconds=1.0)
    assert len(hellos(rig)) == said
    assert sum(isinstance(message, Heartbeat) for message in rig.took["server"]) >= 3


def test_nodes_are_welcomed_and_kept_alive(rig: PredictorRig) -> None:
    rig.pump(seconds=1.0)
    assert rig.predictor.switchboard.nodes == sorted(NODES)
    for node_id in NODES:
        assert kinds(rig.took[node_id]) == {"Welcome", "Heartbeat"}


def test_silent_node_is_dropped_and_its_schedules_are_counted_not_fatal(rig: PredictorRig, store: ExpertStore) -> None:
    gone = rig.nodes.pop("n1")
    gone.close()
    rig.pump(seconds=LOST_AFTER_S + 0.2)
    assert rig.predictor.switchboard.nodes == ["n2", "n3", "n4"]
    full, token = rig.started(store, PROMPT)
    rig.align(full, token, rows=len(PROMPT))
    rig.pump()
    full.step([token])
    assert forecast_at_server(rig, len(PROMPT)) == full.routings
    assert rig.predictor.switchboard.counters.unsent > 0


def test_node_that_takes_the_predictor_for_another_is_sent_away(rig: PredictorRig) -> None:
    rig.nodes["n2"].send("predictor", Bye(reason="restart"), epoch=0)
    rig.nodes["n2"].send("predictor", Heartbeat(count=1), epoch=0)
    rig.pump()
    assert "n2" not in rig.predictor.switchboard.nodes
    assert "Bye" in kinds(rig.took["n2"])
    rig.hello("n2")
    rig.pump()
    assert "n2" in rig.predictor.switchboard.nodes


def test_lost_server_means_new_incarnation_and_no_sequences(
    rig: PredictorRig, store: ExpertStore, shadow: Shadow
) -> None:
    full, token = rig.started(store, PROMPT)
    rig.align(full, token, rows=len(PROMPT))
    rig.pump()
    rig.pump(seconds=LOST_AFTER_S + 0.2, alive=False)
    assert shadow.num_sequences == 0
    assert not rig.predictor.switchboard.joined
    assert len({hello.incarnation for hello in hellos(rig)}) == 2
    for node_id in NODES:
        rig.hello(node_id)
    rig.restart_server()
    rig.pump(seconds=HELLO_EVERY_S + 0.1, alive=False)
    rig.say(Welcome(heartbeat_s=0.25, lost_after_s=1.5))
    rig.say(Start(sequence=1))
    rig.align(full, token, rows=len(PROMPT))
    rig.pump()
    full.step([token])
    rig.schedules("server")
    assert shadow.length(1) == len(PROMPT) + 1


def test_bye_of_the_server_is_believed_at_once(rig: PredictorRig) -> None:
    rig.say(Bye(reason="stopping"))
    rig.pump()
    assert not rig.predictor.switchboard.joined


def test_refusal_ends_the_predictor(shadow: Shadow) -> None:
    rig = PredictorRig(shadow)
    rig.pump()
    rig.say(Refused(reason="its store has another digest"))
    with pytest.raises(RefusedError, match="another digest"):
        rig.pump()


# ------------------------------------------------------------------------------------------- what goes wrong


def test_sequence_with_a_gap_is_dropped_said_so_once_and_started_anew(
    rig: PredictorRig, store: ExpertStore, shadow: Shadow
) -> None:
    full, token = rig.started(store, PROMPT)
    for _ in range(3):  # rows of one position, but the prompt never came
        rig.align(full, token, rows=1)
        rig.pump()
        token = full.step([token])
    notices = [message for message in rig.took["server"] if isinstance(message, ProtocolErrorNotice)]
    assert len(notices) == 1
    assert "empty" in notices[0].reason
    assert rig.predictor.worker.counters.failed == 1
    incarnations = {hello.incarnation for hello in hellos(rig)}
    rig.pump(seconds=REBIRTH_EVERY_S + 0.5)
    assert len({hello.incarnation for hello in hellos(rig)} - incarnations) == 1
    rig.say(Welcome(heartbeat_s=0.25, lost_after_s=1.5))
    rig.say(Start(sequence=1))
    rig.align(full, token, rows=full.length)
    rig.pump()
    assert shadow.length(1) == full.length + 1


def test_routings_are_not_for_the_shadow(rig: PredictorRig, store: ExpertStore) -> None:
    rig.started(store, PROMPT)
    rig.say(Routed(span=Span(1, len(PROMPT), 1), layer=0, experts=[1, 2]))
    rig.pump()
    (notice,) = [message for message in rig.took["server"] if isinstance(message, ProtocolErrorNotice)]
    assert "did not ask for routings" in notice.reason


def test_sequence_that_is_not_known_is_not_forecast(rig: PredictorRig, store: ExpertStore) -> None:
    full = FullModel(store)
    token = full.step(PROMPT)
    rig.align(full, token, rows=len(PROMPT), sequence=99)
    rig.pump()
    assert rig.schedules("server") == []
    assert rig.predictor.worker.counters.failed == 1


def test_failure_inside_the_model_costs_its_sequence_only(
    rig: PredictorRig, store: ExpertStore, shadow: Shadow, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, token = rig.started(store, PROMPT)
    rig.say(Start(sequence=2))
    rig.align(full, token, rows=len(PROMPT), sequence=1)
    rig.align(full, token, rows=len(PROMPT), sequence=2)
    forecast = shadow.forecast

    def failing(sequence: int, *, on_routing: OnRouting, is_stale: Callable[[], bool]) -> bool:
        if sequence == 1:
            raise RuntimeError("no such luck")
        return forecast(sequence, on_routing=on_routing, is_stale=is_stale)

    monkeypatch.setattr(shadow, "forecast", failing)
    rig.pump()
    assert {schedule.span.sequence for schedule in rig.schedules("server")} == {2}
    assert rig.predictor.worker.counters.failed == 1


def test_orders_of_before_the_welcome_are_not_obeyed(shadow: Shadow) -> None:
    rig = PredictorRig(shadow)
    rig.pump()
    rig.say(Start(sequence=1))
    rig.pump()
    assert shadow.num_sequences == 0
