"""A predictor that runs ahead, on the loopback network: how far it goes, and what becomes of a wrong guess."""

from collections.abc import Callable

import pytest

from odmoe_model.store import ExpertStore
from odmoe_predictor.passes import OnRouting
from odmoe_predictor.shadow import Shadow
from odmoe_wire.messages import Align, AnyMessage, Rollback, Schedule
from support.predictor_plain import PlainWeight
from support.predictor_rig import PredictorRig
from support.stores import tiny_store

PROMPT = [3, 17, 99, 4, 56, 23, 8, 120, 77, 31, 5, 66, 12, 90]
NODES = ("n1", "n2", "n3", "n4")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ExpertStore:
    return ExpertStore.open(tiny_store("mixtral", tmp_path_factory.mktemp("mixtral")), verify=False)


@pytest.fixture
def shadow(store: ExpertStore) -> Shadow:
    return Shadow.load(store, quantize=PlainWeight)


def ahead_rig(shadow: Shadow, *, run_ahead: int) -> PredictorRig:
    rig = PredictorRig(shadow, node_ids=NODES, run_ahead=run_ahead)
    rig.join()
    return rig


def voided(messages: list[AnyMessage]) -> list[Rollback]:
    return [message for message in messages if isinstance(message, Rollback)]


@pytest.mark.parametrize("run_ahead", [1, 2, 5])
def test_running_ahead_ends_at_its_bound_and_goes_on_with_each_alignment(
    shadow: Shadow, store: ExpertStore, run_ahead: int
) -> None:
    rig = ahead_rig(shadow, run_ahead=run_ahead)
    full, token = rig.started(store, PROMPT)
    rows = len(PROMPT)
    for step in range(3):
        rig.align(full, token, rows=rows)
        rig.pump()
        positions = {schedule.span.position for schedule in rig.schedules("server")}
        furthest = full.length + run_ahead
        assert positions == (set(range(full.length, furthest + 1)) if step == 0 else {furthest})
        assert shadow.length(1) == furthest + 1
        token, rows = full.step([token]), 1
    counters = rig.predictor.worker.counters
    assert (counters.forecast, counters.known, counters.undone) == (1, 2, 0)
    assert counters.ahead == run_ahead + 2


def test_running_ahead_on_a_wrong_token_is_forecast_again(shadow: Shadow, store: ExpertStore) -> None:
    rig = ahead_rig(shadow, run_ahead=1)
    full, token = rig.started(store, PROMPT)
    rig.align(full, token, rows=len(PROMPT))
    rig.pump()
    rig.schedules("server")
    sampled = (full.step([token]) + 1) % full.vocab_size
    position = full.length
    rig.align(full, sampled, rows=1)
    rig.pump()
    full.step([sampled])
    again = [schedule for schedule in rig.schedules("server") if schedule.span.position == position]
    assert {schedule.layer: schedule.experts for schedule in again} == full.routings
    counters = rig.predictor.worker.counters
    assert (counters.known, counters.undone) == (0, 1)


@pytest.mark.parametrize("right", [True, False])
def test_alignment_amid_running_ahead_ends_it_only_when_the_token_is_wrong(
    shadow: Shadow, store: ExpertStore, monkeypatch: pytest.MonkeyPatch, right: bool
) -> None:
    rig = ahead_rig(shadow, run_ahead=1)
    full, token = rig.started(store, PROMPT)
    position = len(PROMPT)
    routed: list[tuple[int, int]] = []
    forecast = shadow.forecast

    def interrupted(sequence: int, *, on_routing: OnRouting, is_stale: Callable[[], bool]) -> bool:
        at = shadow.length(sequence)

        def note(layer: int, experts: list[int]) -> None:
            on_routing(layer, experts)
            routed.append((at - position, layer))
            if routed.count((1, 0)) == 1 and routed[-1] == (1, 0):
                sampled = full.step([token])
                rig.align(full, sampled if right else (sampled + 1) % full.vocab_size, rows=1)
                rig.predictor.switchboard.pump(rig.network.clock())

        return forecast(sequence, on_routing=note, is_stale=is_stale)

    monkeypatch.setattr(shadow, "forecast", interrupted)
    rig.align(full, token, rows=position)
    rig.pump()
    layers = range(store.manifest.num_moe_layers)
    ahead = [(1, layer) for layer in layers]
    expected = (
        [(0, layer) for layer in layers] + (ahead if right else [(1, 0), *ahead]) + [(2, layer) for layer in layers]
    )
    assert routed == expected
    counters = rig.predictor.worker.counters
    assert (counters.known, counters.abandoned) == ((1, 0) if right else (0, 1))
    void = [] if right else [Rollback(sequence=1, position=position + 1)]
    for node_id in NODES:
        assert voided(rig.took[node_id]) == void, "also of a forecast that was given up after its first layer"


@pytest.mark.parametrize("run_ahead", [1, 3])
def test_forecasts_of_a_wrong_guess_are_void_everywhere_before_the_new_ones(
    shadow: Shadow, store: ExpertStore, run_ahead: int
) -> None:
    rig = ahead_rig(shadow, run_ahead=run_ahead)
    full, token = rig.started(store, PROMPT)
    rig.align(full, token, rows=len(PROMPT))
    rig.pump()
    token = full.step([token])
    rig.align(full, token, rows=1)
    rig.pump()
    assert not any(voided(took) for took in rig.took.values()), "every guess was right so far"
    for took in rig.took.values():
        took.clear()
    sampled = (full.step([token]) + 1) % full.vocab_size
    position = full.length
    rig.align(full, sampled, rows=1)
    rig.pump()
    assert sorted(rig.took) == sorted(("server", *NODES))
    for took in rig.took.values():
        assert next(type(message) for message in took if isinstance(message, Rollback | Schedule)) is Rollback
        assert voided(took) == [Rollback(sequence=1, position=position)]
    assert rig.predictor.switchboard.counters.rollbacks == len(NODES) + 1
    again = {message.span.position for message in rig.took["server"] if isinstance(message, Schedule)}
    assert again == set(range(position, position + run_ahead + 1))


def test_only_what_was_forecast_for_a_wrong_token_is_void(shadow: Shadow, store: ExpertStore) -> None:
    """Three positions are out; the first was right, as a step of two tokens shows."""
    rig = ahead_rig(shadow, run_ahead=3)
    full, token = rig.started(store, PROMPT)
    rig.align(full, token, rows=len(PROMPT))
    rig.pump()
    first = full.step([token])
    second = full.step([first])
    tokens = [first, (second + 1) % full.vocab_size]
    rig.say(Align(sequence=1, position=len(PROMPT) + 1, tokens=tokens, cache=[]))
    rig.pump()
    assert voided(rig.took["server"]) == [Rollback(sequence=1, position=len(PROMPT) + 2)]


def drafted(messages: list[AnyMessage]) -> dict[int, int]:
    """By position, the tokens that came with first layers."""
    firsts = [message for message in messages if isinstance(message, Schedule) and message.tokens]
    assert all(message.layer == 0 and len(message.tokens) == message.span.length for message in firsts)
    return {message.span.position: message.tokens[0] for message in firsts}


def test_server_hears_the_tokens_of_first_layers_and_nodes_do_not(shadow: Shadow, store: ExpertStore) -> None:
    rig = ahead_rig(shadow, run_ahead=4)
    full, token = rig.started(store, PROMPT)
    rig.align(full, token, rows=len(PROMPT))
    rig.pump()
    expected = {}
    for position in range(len(PROMPT), len(PROMPT) + 5):
        expected[position], token = token, full.step([token])
    assert drafted(rig.took["server"]) == expected
    assert len(rig.schedules("server")) == 5 * store.manifest.num_moe_layers
    assert not any(drafted(rig.took[node_id]) for node_id in NODES)


@pytest.mark.parametrize("accepted", [3, 9])
def test_alignment_over_several_accepted_drafts_moves_the_bound_and_costs_no_forecast(
    shadow: Shadow, store: ExpertStore, accepted: int
) -> None:
    rig = ahead_rig(shadow, run_ahead=16)
    full, token = rig.started(store, PROMPT)
    rig.align(full, token, rows=len(PROMPT))
    rig.pump()
    for _ in range(2):
        rig.schedules("server")
        for _ in range(accepted):
            token = full.step([token])
        rig.align(full, token, rows=accepted)
        rig.pump()
        positions = {schedule.span.position for schedule in rig.schedules("server")}
        assert positions == set(range(full.length + 17 - accepted, full.length + 17))
        assert shadow.length(1) == full.length + 17
    counters = rig.predictor.worker.counters
    assert (counters.forecast, counters.known, counters.undone) == (1, 2, 0)
    assert counters.ahead == 16 + 2 * accepted


def test_rejected_draft_is_void_from_there_on_and_the_shadow_runs_ahead_anew(
    shadow: Shadow, store: ExpertStore
) -> None:
    """Of sixteen positions ahead two drafts are accepted and the third is not."""
    rig = ahead_rig(shadow, run_ahead=16)
    full, token = rig.started(store, PROMPT)
    rig.align(full, token, rows=len(PROMPT))
    rig.pump()
    for took in rig.took.values():
        took.clear()
    for _ in range(3):
        token = full.step([token])
    position, sampled = full.length, (token + 1) % full.vocab_size
    rig.align(full, sampled, rows=3)
    rig.pump()
    for took in rig.took.values():
        told = [message for message in took if isinstance(message, Rollback | Schedule)]
        assert told[0] == Rollback(sequence=1, position=position)
        assert voided(took) == [told[0]]
    again = drafted(rig.took["server"])
    assert sorted(again) == list(range(position, position + 17))
    expected = [sampled]
    for _ in range(16):
        expected.append(full.step([expected[-1]]))
    assert [again[at] for at in sorted(again)] == expected
