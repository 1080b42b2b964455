"""A predictor with several sequences, on the loopback network: who comes first, who shares a forward, and that one
sequence's trouble is not the others'."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from odmoe_model.store import ExpertStore
from odmoe_predictor import shadow as shadow_module
from odmoe_predictor.shadow import Shadow
from odmoe_wire.messages import Align, End, ProtocolErrorNotice, Rollback, Schedule, Start
from support.predictor_plain import FullModel, PlainWeight
from support.predictor_rig import PredictorRig
from support.stores import tiny_store

PROMPTS = {1: [3, 17, 99, 4, 56, 23, 8, 120, 77], 2: [31, 5, 66], 3: [12, 90, 7, 7, 40]}
OnRouting = Callable[[int, int, list[int]], None]
IsStale = Callable[[int], bool]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ExpertStore:
    return ExpertStore.open(tiny_store("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe")), verify=False)


@pytest.fixture(scope="module")
def windowed_store(tmp_path_factory: pytest.TempPathFactory) -> ExpertStore:
    return ExpertStore.open(tiny_store("gpt_oss", tmp_path_factory.mktemp("gpt_oss")), verify=False)


class Users:
    """A rig, and the full model of each sequence with its next token."""

    def __init__(self, store: ExpertStore, *, run_ahead: int) -> None:
        self.shadow = Shadow.load(store, quantize=PlainWeight)
        self.rig = PredictorRig(self.shadow, node_ids=("n1", "n2"), run_ahead=run_ahead)
        self.rig.join()
        self.fulls = {sequence: FullModel(store) for sequence in PROMPTS}
        self.tokens = {sequence: full.step(PROMPTS[sequence]) for sequence, full in self.fulls.items()}
        for sequence in PROMPTS:
            self.rig.say(Start(sequence=sequence))

    def align(self, *sequences: int, rows: int | None = None, wrong: Sequence[int] = ()) -> None:
        """The server says where it is with the sequences; those that are `wrong` are given another token."""
        for sequence in sequences:
            full = self.fulls[sequence]
            if sequence in wrong:
                self.tokens[sequence] = (self.tokens[sequence] + 1) % full.vocab_size
            self.rig.align(full, self.tokens[sequence], rows=rows or full.length, sequence=sequence)

    def step(self, *sequences: int) -> None:
        """The full model takes a token of each."""
        for sequence in sequences:
            self.tokens[sequence] = self.fulls[sequence].step([self.tokens[sequence]])

    def forwards(self) -> list[tuple[int, int]]:
        """Sequence and position of what the server was told of first layers, oldest first."""
        told = self.rig.schedules("server")
        return [(one.span.sequence, one.span.position - len(PROMPTS[one.span.sequence])) for one in told if one.tokens]


def amid_forward(users: Users, monkeypatch: pytest.MonkeyPatch, *, at: int, do: Callable[[], None]) -> None:
    """Have something said in the midst of the shared forward number `at`."""
    together, count = users.shadow.forecast_together, [0]

    def interrupted(
        sequences: Sequence[int], *, on_routing: OnRouting, is_stale: IsStale, go_on: bool = False
    ) -> list[int]:
        count[0] += 1
        mine = count[0]

        def note(sequence: int, layer: int, experts: list[int]) -> None:
            on_routing(sequence, layer, experts)
            if (mine, sequence, layer) == (at, sequences[-1], 0):
                do()
                users.rig.predictor.switchboard.pump(users.rig.network.clock())

        return together(sequences, on_routing=note, is_stale=is_stale, go_on=go_on)

    monkeypatch.setattr(users.shadow, "forecast_together", interrupted)


@pytest.mark.parametrize("shared", [True, False])
def test_sequences_get_ahead_evenly_by_one_forward_or_one_after_the_other(
    store: ExpertStore, windowed_store: ExpertStore, shared: bool
) -> None:
    users = Users(store if shared else windowed_store, run_ahead=3)
    users.align(1, 2, 3)
    users.rig.pump()
    assert users.shadow.shares(1) == shared
    assert users.forwards() == [(sequence, ahead) for ahead in range(4) for sequence in (1, 2, 3)]
    counters = users.rig.predictor.worker.counters
    assert (counters.forecast, counters.ahead) == (3, 9)


def test_forecasts_and_drafts_of_shared_forwards_are_those_of_the_full_models(store: ExpertStore) -> None:
    users = Users(store, run_ahead=5)
    users.align(1, 2, 3)
    users.rig.pump()
    told = users.rig.schedules("server")
    for _ in range(6):
        for sequence, full in users.fulls.items():
            here = [one for one in told if (one.span.sequence, one.span.position) == (sequence, full.length)]
            assert here[0].tokens == [users.tokens[sequence]]
            users.step(sequence)
            assert {one.layer: one.experts for one in here} == full.routings


def test_who_is_waited_for_comes_before_anybody_runs_ahead(store: ExpertStore, monkeypatch: pytest.MonkeyPatch) -> None:
    users = Users(store, run_ahead=4)
    amid_forward(users, monkeypatch, at=2, do=lambda: users.align(3))
    users.align(1, 2)
    users.rig.pump()
    both = [(sequence, 1) for sequence in (1, 2)]
    assert users.forwards()[:7] == [(1, 0), (2, 0), *both, (3, 0), (3, 1), (1, 2)], "and 3, least far ahead, catches up"


def test_order_that_comes_while_others_are_obeyed_goes_before_running_ahead(
    store: ExpertStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    users = Users(store, run_ahead=2)
    users.align(1)
    users.rig.pump()
    users.step(1)
    users.forwards()
    align = users.shadow.align

    def late(sequence: int, **what: Any) -> str:
        if sequence == 1:
            users.align(2)
            users.rig.predictor.switchboard.pump(users.rig.network.clock())
        return align(sequence, **what)

    monkeypatch.setattr(users.shadow, "align", late)
    users.align(1, rows=1)
    users.rig.pump()
    assert users.forwards() == [(2, 0), (2, 1), (1, 3), (2, 2)]


def test_wrong_token_amid_a_shared_forward_ends_it_for_its_own_sequence_only(
    store: ExpertStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    users = Users(store, run_ahead=2)

    def sample() -> None:
        users.step(1, 2, 3)
        users.align(1, 2, 3, rows=1, wrong=[2])

    amid_forward(users, monkeypatch, at=2, do=sample)
    users.align(1, 2, 3)
    users.rig.pump()
    took = users.rig.took["server"]
    void = [at for at, message in enumerate(took) if isinstance(message, Rollback)]
    assert [took[at] for at in void] == [Rollback(sequence=2, position=len(PROMPTS[2]) + 1)]
    layers = store.manifest.num_moe_layers
    told = [
        (message.span.sequence, message.layer)
        for message in took[: void[0]]
        if isinstance(message, Schedule) and message.span.position == len(PROMPTS[message.span.sequence]) + 1
    ]
    assert sorted(told) == sorted([(2, 0), *((sequence, layer) for sequence in (1, 3) for layer in range(layers))])
    assert users.forwards()[6] == (2, 1), "it is forecast anew before the others go on"
    counters = users.rig.predictor.worker.counters
    assert (counters.known, counters.undone, counters.abandoned, counters.failed) == (2, 0, 1, 0)
    assert all(users.shadow.length(sequence) == users.fulls[sequence].length + 3 for sequence in PROMPTS)


def test_sequence_that_ends_amid_a_shared_forward_is_gone(store: ExpertStore, monkeypatch: pytest.MonkeyPatch) -> None:
    users = Users(store, run_ahead=2)
    amid_forward(users, monkeypatch, at=1, do=lambda: users.rig.say(End(sequence=1)))
    users.align(1, 2, 3)
    users.rig.pump()
    assert users.shadow.num_sequences == 2
    assert users.forwards() == [(1, 0), (2, 0), (3, 0), (2, 1), (3, 1), (2, 2), (3, 2)]


def test_shared_forward_that_fails_is_tried_one_by_one_and_only_the_guilty_is_dropped(
    store: ExpertStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    users = Users(store, run_ahead=0)
    token_at = users.shadow.token_at

    def bad(sequence: int, position: int) -> int | None:
        if sequence == 2:
            raise RuntimeError("no such luck")
        return token_at(sequence, position)

    users.align(1, 2, 3)
    monkeypatch.setattr(users.shadow, "token_at", bad)
    users.rig.pump()
    assert set(users.forwards()) == {(1, 0), (3, 0)}
    assert users.rig.predictor.worker.counters.failed == 1
    notices = [message for message in users.rig.took["server"] if isinstance(message, ProtocolErrorNotice)]
    assert [notice.reason for notice in notices] == ["sequence 2: RuntimeError"]
    assert users.shadow.num_sequences in (0, 2), "the server begins them all anew"


def test_long_prompt_the_shadow_computes_itself_leaves_turns_to_others(
    store: ExpertStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shadow_module, "MOST_ROWS", 4)
    users = Users(store, run_ahead=0)
    order: list[tuple[int, int]] = []
    feed_some, forecast = users.shadow.feed_some, users.shadow.forecast

    def feeding(sequence: int, *, is_stale: Callable[[], bool]) -> bool:
        order.append((sequence, users.shadow.length(sequence)))
        return feed_some(sequence, is_stale=is_stale)

    def forecasting(sequence: int, **how: Any) -> bool:
        order.append((sequence, users.shadow.length(sequence)))
        return forecast(sequence, **how)

    monkeypatch.setattr(users.shadow, "feed_some", feeding)
    monkeypatch.setattr(users.shadow, "forecast", forecasting)
    users.rig.say(Align(sequence=1, position=0, tokens=PROMPTS[1], cache=[]))
    users.align(2)
    users.rig.pump()
    assert order == [(1, 0), (2, 3), (1, 4), (1, 8)]
    users.rig.say(Align(sequence=1, position=9, tokens=[users.tokens[1]], cache=[]))
    users.rig.pump()
    users.step(1)
    told = {one.layer: one.experts for one in users.rig.schedules("server") if one.span.sequence == 1}
    assert told == users.fulls[1].routings


def test_alignment_amid_a_long_prompt_does_not_undo_what_is_computed(
    store: ExpertStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shadow_module, "MOST_ROWS", 4)
    users = Users(store, run_ahead=0)
    feed_some, lengths = users.shadow.feed_some, list[int]()

    def feeding(sequence: int, *, is_stale: Callable[[], bool]) -> bool:
        lengths.append(users.shadow.length(sequence))
        token = users.tokens[1]
        users.step(1)
        users.rig.say(Align(sequence=1, position=users.fulls[1].length - 1, tokens=[token], cache=[]))
        users.rig.predictor.switchboard.pump(users.rig.network.clock())
        return feed_some(sequence, is_stale=is_stale)

    monkeypatch.setattr(users.shadow, "feed_some", feeding)
    users.rig.say(Align(sequence=1, position=0, tokens=PROMPTS[1], cache=[]))
    users.rig.pump()
    assert lengths == [0, 4]
    told = {one.layer: one.experts for one in users.rig.schedules("server")}
    assert told == users.fulls[1].routings
    assert users.rig.predictor.worker.counters.abandoned == 0
