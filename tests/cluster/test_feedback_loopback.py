"""Feedback from server to shadow, all roles on one thread: when it is heard, who hears a correction, what it brings."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from odmoe_model.quantize import Int4Weight
from odmoe_model.store import ExpertStore
from odmoe_model.tensors import to_blob
from odmoe_predictor.mailbox import MAX_CORRECTIONS, Forecast, Mailbox, Order, Word
from odmoe_predictor.shadow import Shadow
from odmoe_predictor.worker import Worker
from odmoe_server.engine.build import EngineOptions
from odmoe_wire.messages import Align, Member, Rollback, Routed, Schedule, SlotMode, Span, Start, View
from odmoe_wire.waiting import Wake
from support.loopback_cluster import LoopbackCluster
from support.predictor_plain import FullModel, PlainWeight
from support.predictor_rig import PredictorRig
from support.reference import reference_tokens
from support.stores import tiny_store

PROMPT = [3, 17, 99, 4, 56, 23, 8, 120, 77, 31, 5, 66, 12, 90]
NODES = ("n1", "n2", "n3", "n4")
NUM_LAYERS = 8
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> tuple[ExpertStore, list[int]]:
    """A model of eight layers, and its answer."""
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("mixtral")
    store = ExpertStore.open(tiny_store("mixtral", directory, num_hidden_layers=NUM_LAYERS), verify=False)
    return store, reference_tokens(directory / "checkpoint", PROMPT, NUM_TOKENS)


@pytest.fixture
def store(deep: tuple[ExpertStore, list[int]]) -> ExpertStore:
    return deep[0]


@pytest.fixture
def shadow(store: ExpertStore) -> Shadow:
    return Shadow.load(store, quantize=PlainWeight, feedback=True)


def far_off(seed: int = 0) -> Tensor:
    """A row that sends a layer to other experts."""
    return 30 * torch.randn(1, 64, generator=torch.Generator().manual_seed(seed))


def routed(position: int, layer: int, *, sequence: int = 1) -> Routed:
    return Routed(span=Span(sequence, position), layer=layer, experts=[0, 1])


def ready_rig(shadow: Shadow, *, run_ahead: int, mode: SlotMode = "on-demand") -> PredictorRig:
    rig = PredictorRig(shadow, node_ids=NODES, run_ahead=run_ahead, num_layers=NUM_LAYERS)
    rig.join()
    rig.say(View(members=[Member(node_id, 4) for node_id in NODES], group_size=2, mode=mode))
    rig.pump()
    return rig


def amid(shadow: Shadow, monkeypatch: pytest.MonkeyPatch, *, position: int, layer: int, do: Callable[[], None]) -> None:
    """Do something once, when the shadow has forecast a layer of a position."""
    forecast, left = shadow.forecast, [do]

    def interrupted(sequence: int, *, on_routing: Any, is_stale: Any) -> bool:
        at = shadow.length(sequence)

        def note(spoken: int, experts: list[int]) -> None:
            on_routing(spoken, experts)
            if (at, spoken) == (position, layer) and left:
                left.pop()()

        return forecast(sequence, on_routing=note, is_stale=is_stale)

    monkeypatch.setattr(shadow, "forecast", interrupted)


def test_a_correction_amid_a_forward_goes_out_before_its_next_layer(
    shadow: Shadow, store: ExpertStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = ready_rig(shadow, run_ahead=1)
    full, token = rig.started(store, PROMPT)
    position = full.length

    def progress() -> None:
        rig.say(routed(position, 1), blobs=[to_blob(far_off())])
        rig.predictor.switchboard.pump(rig.network.clock())

    amid(shadow, monkeypatch, position=position + 1, layer=2, do=progress)
    rig.align(full, token, rows=position)
    rig.pump()
    at = [(schedule.span.position - position, schedule.layer) for schedule in rig.schedules("server")]
    assert at == [(0, layer) for layer in range(8)] + [(1, 0), (1, 1), (1, 2), (0, 3)] + [(1, n) for n in range(3, 8)]
    assert (rig.predictor.worker.counters.corrected, rig.predictor.worker.counters.uncorrected) == (1, 0)


@pytest.mark.parametrize("mode", ["on-demand", "lru"])
def test_nodes_and_server_have_the_corrected_experts_and_no_others(
    shadow: Shadow, store: ExpertStore, mode: SlotMode
) -> None:
    rig = ready_rig(shadow, run_ahead=0, mode=mode)
    full, token = rig.started(store, PROMPT)
    position = full.length
    rig.align(full, token, rows=position)
    rig.pump()
    full.step([token])
    shares = {node_id: newest(rig.schedules(node_id)) for node_id in NODES}
    assert newest(rig.schedules("server"))[3] == full.routings[3]
    rig.say(routed(position, 1), blobs=[to_blob(far_off())])
    rig.pump()
    corrected = newest(rig.schedules("server"))
    assert list(corrected) == [3], "there are two groups, so it is the next layer of the same nodes"
    assert corrected[3] != full.routings[3]
    for node_id in NODES:
        shares[node_id] |= newest(rig.schedules(node_id))
    assert sorted(expert for share in shares.values() for expert in share.get(3, [])) == corrected[3]


def newest(schedules: list[Schedule]) -> dict[int, list[int]]:
    return {schedule.layer: schedule.experts for schedule in schedules}


def test_what_changes_nothing_is_not_told_and_what_has_no_later_layer_not_heard(
    shadow: Shadow, store: ExpertStore
) -> None:
    rig = ready_rig(shadow, run_ahead=0)
    full, token = rig.started(store, PROMPT)
    position = full.length
    rig.align(full, token, rows=position)
    rig.pump()
    full.step([token])
    rig.schedules("server")
    for layer in range(NUM_LAYERS):
        rig.say(routed(position, layer), blobs=[to_blob(full.inputs[layer])])
    for layer in (NUM_LAYERS - 2, NUM_LAYERS - 1):
        rig.say(routed(position, layer), blobs=[to_blob(far_off())])
    rig.pump()
    assert rig.schedules("server") == []
    counters = rig.predictor.worker.counters
    assert (counters.corrected, counters.uncorrected, counters.failed) == (0, 0, 0)


def test_progress_of_a_token_that_was_not_the_shadows_corrects_nothing(shadow: Shadow, store: ExpertStore) -> None:
    rig = ready_rig(shadow, run_ahead=1)
    full, token = rig.started(store, PROMPT)
    rig.align(full, token, rows=len(PROMPT))
    rig.pump()
    sampled = (full.step([token]) + 1) % full.vocab_size
    position = full.length
    rig.align(full, sampled, rows=1)
    rig.say(routed(position, 1), blobs=[to_blob(far_off())])
    rig.schedules("server")
    rig.pump()
    counters = rig.predictor.worker.counters
    assert (counters.corrected, counters.uncorrected) == (0, 1)
    assert Rollback(sequence=1, position=position) in rig.took["server"]
    full.step([sampled])
    again = [schedule for schedule in rig.schedules("server") if schedule.span.position == position]
    assert newest(again) == full.routings


@pytest.mark.parametrize("right", [True, False])
def test_progress_that_overtakes_an_alignment_counts_only_if_the_token_is_the_shadows(
    shadow: Shadow, store: ExpertStore, right: bool
) -> None:
    """Another sequence's forward is under way while alignment and progress of this one wait."""
    mailbox, full = Mailbox(Wake()), FullModel(store)
    worker = Worker(shadow, mailbox, run_ahead=1)
    first = full.step(PROMPT)
    layers, tensors = full.export(len(PROMPT))
    blobs = tuple(to_blob(tensor) for tensor in tensors)
    for sequence in (1, 2):
        mailbox.order(Order(Start(sequence=sequence)))
        mailbox.order(Order(Align(sequence=sequence, position=len(PROMPT), tokens=[first], cache=layers), blobs))
    worker.work()
    mailbox.words()
    position = len(PROMPT) + 1
    own = shadow.token_at(2, position)
    assert own is not None
    said: list[Word] = []
    publish = mailbox.publish

    def overtaken(word: Word) -> None:
        publish(word)
        said.append(word)
        if len(said) == 1:
            token = own if right else (own + 1) % full.vocab_size
            mailbox.order(Order(Align(sequence=2, position=position, tokens=[token], cache=[])))
            mailbox.order(Order(routed(position, 1, sequence=2), (to_blob(far_off()),), corrects=3))

    mailbox.publish = overtaken  # type: ignore[method-assign]
    mailbox.order(Order(Align(sequence=1, position=position, tokens=[own], cache=[])))
    worker.work()
    corrected = [word for word in said if isinstance(word, Forecast) and word.span == Span(2, position)]
    assert [word.layer for word in corrected] == ([3] if right else [])
    assert (worker.counters.corrected, worker.counters.uncorrected) == ((1, 0) if right else (0, 1))


def test_more_progress_than_there_is_room_for_is_no_trouble(shadow: Shadow, store: ExpertStore) -> None:
    rig = ready_rig(shadow, run_ahead=0)
    full, token = rig.started(store, PROMPT)
    for _ in range(MAX_CORRECTIONS + 100):
        rig.say(routed(full.length, 1), blobs=[to_blob(far_off())])
    while rig.predictor.switchboard.pump(rig.network.clock()):
        pass
    rig.align(full, token, rows=len(PROMPT))
    rig.pump(seconds=6.0)
    counters = rig.predictor.switchboard.counters
    assert counters.refused == 101, "the sequence's start has taken a place"
    assert counters.rebirths == 0
    full.step([token])
    assert newest(rig.schedules("server")) == full.routings


# -------------------------------------------------------------------------------------------------- the whole cluster


def answer(
    store: ExpertStore, *, feedback: bool, num_nodes: int, run_ahead: int, **options: Any
) -> tuple[list[int], float, LoopbackCluster]:
    """Tokens and recall of one generation with the coarsest of shadows."""
    cluster = LoopbackCluster(store, options=EngineOptions(endpoint="inproc://unused", **options))
    cluster.add_predictor(run_ahead=run_ahead, quantize=Int4Weight, feedback=feedback)
    members = [f"n{number}" for number in range(num_nodes)]
    for peer_id in members:
        cluster.add_node(peer_id, slots=1, predictor=True)
    cluster.await_members(*members, "predictor")
    cluster.settle(seconds=0.5)
    tokens, stats = cluster.generate(PROMPT, max_tokens=NUM_TOKENS)
    return tokens, stats.predicted / stats.activations, cluster


@pytest.mark.parametrize("run_ahead", [0, 1])
@pytest.mark.parametrize(("num_nodes", "group_size"), [(1, 1), (2, 2), (4, 2), (3, 1), (5, 2)])
def test_the_answer_stays_and_more_is_foreseen(
    deep: tuple[ExpertStore, list[int]], num_nodes: int, group_size: int, run_ahead: int
) -> None:
    store, expected = deep
    recalls: dict[bool, float] = {}
    for feedback in (False, True):
        tokens, recalls[feedback], cluster = answer(
            store, feedback=feedback, num_nodes=num_nodes, run_ahead=run_ahead, group_size=group_size
        )
        assert tokens == expected
        counters = cluster.predictor.worker.counters
        assert counters.failed == 0
        assert (counters.corrected > 0) == feedback
        cluster.assert_nothing_held()
    assert recalls[True] > recalls[False]
