"""What a rival is told and what goes out of its forecasts: in order, of the newest step, one bad sequence by itself."""

import pytest
import torch
from torch import Tensor

from odmoe_model.tensors import to_blob
from odmoe_predictor.mailbox import Forecast, Mailbox, Order, OrderMessage
from odmoe_predictor.rival_worker import RivalWorker
from odmoe_wire.codec import Blob
from odmoe_wire.messages import Align, CacheLayer, End, Routed, Span, Start, Wants
from odmoe_wire.waiting import Wake


class Echo:
    """Forecasts layer 0 at each token and the next layer of each routed one; `told` is all it heard."""

    wants: Wants = "routings"
    held_bytes = 0

    def __init__(self) -> None:
        self.told: list[tuple[object, ...]] = []
        self.fails_at: int | None = None

    def begin(self, sequence: int) -> None:
        self.told.append(("begin", sequence))

    def end(self, sequence: int) -> None:
        self.told.append(("end", sequence))

    def on_token(self, sequence: int) -> dict[int, list[int]]:
        self.told.append(("token", sequence))
        return {0: [sequence]}

    def on_routed(self, sequence: int, layer: int, experts: list[int], x_TH: Tensor | None) -> dict[int, list[int]]:
        if self.fails_at == sequence:
            raise RuntimeError("no such luck")
        self.told.append(("routed", sequence, layer, experts, None if x_TH is None else x_TH.tolist()))
        return {layer + 2: [4], layer + 1: experts}


class Rig:
    """`say` messages, then `work`; `out` is what went out then."""

    def __init__(self, *, max_sequences: int = 64) -> None:
        self.rival = Echo()
        self.mailbox = Mailbox(Wake())
        self.worker = RivalWorker(self.rival, self.mailbox, max_sequences=max_sequences)

    def say(self, *messages: OrderMessage, blobs: tuple[Blob, ...] = ()) -> "Rig":
        for message in messages:
            self.mailbox.order(Order(message, blobs))
        return self

    def out(self) -> list[tuple[int, int, int, list[int]]]:
        assert self.worker.work()
        words = self.mailbox.words()
        assert all(isinstance(word, Forecast) for word in words)
        return [
            (word.span.sequence, word.span.position, word.layer, word.experts)
            for word in words
            if isinstance(word, Forecast)
        ]


@pytest.fixture
def rig() -> Rig:
    return Rig()


def token(position: int, *, sequence: int = 1) -> Align:
    return Align(sequence=sequence, position=position, tokens=[9], cache=[])


def routed(position: int, layer: int, experts: list[int], *, sequence: int = 1) -> Routed:
    return Routed(span=Span(sequence, position, 1), layer=layer, experts=experts)


def test_each_message_brings_its_forecasts_in_order_of_layers(rig: Rig) -> None:
    assert rig.say(Start(sequence=1)).out() == []
    assert rig.say(token(7)).out() == [(1, 7, 0, [1])]
    assert rig.say(routed(7, 0, [2, 3])).out() == [(1, 7, 1, [2, 3]), (1, 7, 2, [4])]
    assert rig.say(End(sequence=1)).out() == []
    assert rig.rival.told[-1] == ("end", 1)
    assert not rig.worker.work(), "nothing waits"


def test_inputs_are_handed_on(rig: Rig) -> None:
    rig.say(Start(sequence=1), token(7)).out()
    rig.say(routed(7, 0, [2]), blobs=(to_blob(torch.tensor([[1.0, 2.0]])),)).out()
    assert rig.rival.told[-1] == ("routed", 1, 0, [2], [[1.0, 2.0]])


def test_of_steps_that_piled_up_all_is_learned_and_only_the_newest_goes_out(rig: Rig) -> None:
    rig.say(Start(sequence=1), token(7), routed(7, 0, [2]), token(8), routed(8, 0, [3]), token(3, sequence=2))
    assert rig.say(Start(sequence=3), token(5, sequence=3)).out() == [
        (1, 8, 0, [1]),
        (1, 8, 1, [3]),
        (1, 8, 2, [4]),
        (3, 5, 0, [3]),
    ]
    assert ("routed", 1, 0, [2], None) in rig.rival.told
    counters = rig.worker.counters
    assert (counters.forecast, counters.skipped, counters.failed) == (2, 1, 1), "sequence 2 never began"


def test_layers_of_another_step_than_the_one_begun_are_passed_over(rig: Rig) -> None:
    rig.say(routed(7, 0, [2])).out()
    rig.say(Start(sequence=1), routed(7, 1, [2])).out()
    assert rig.say(token(8), routed(7, 1, [2]), routed(8, 0, [5])).out() == [
        (1, 8, 0, [1]),
        (1, 8, 1, [5]),
        (1, 8, 2, [4]),
    ]
    assert [told for told in rig.rival.told if told[0] == "routed"] == [("routed", 1, 0, [5], None)]
    assert (rig.worker.counters.skipped, rig.worker.counters.failed) == (3, 0)
    assert rig.mailbox.troubles() == []


@pytest.mark.parametrize(
    "bad",
    [
        Align(sequence=1, position=8, tokens=[], cache=[]),
        Align(sequence=1, position=8, tokens=[9], cache=[CacheLayer(kind="kv", rows=1, length=8, blobs=2)]),
        token(8, sequence=2),
    ],
)
def test_what_a_rival_cannot_use_is_said_once(rig: Rig, bad: Align) -> None:
    rig.say(Start(sequence=1), token(7)).out()
    rig.say(bad).out()
    (trouble,) = rig.mailbox.troubles()
    assert trouble.startswith(f"sequence {bad.sequence}")
    assert rig.say(bad).out() == []
    assert rig.mailbox.troubles() == []
    assert rig.worker.counters.failed == 1


def test_a_failure_costs_its_sequence_only_until_it_starts_anew(rig: Rig) -> None:
    rig.say(Start(sequence=1), Start(sequence=2), token(7), token(7, sequence=2)).out()
    rig.rival.fails_at = 1
    assert rig.say(routed(7, 0, [2]), routed(7, 0, [3], sequence=2)).out() == [(2, 7, 1, [3]), (2, 7, 2, [4])]
    assert rig.mailbox.troubles() == ["sequence 1: RuntimeError"]
    rig.rival.fails_at = None
    assert rig.say(token(8), routed(8, 0, [2])).out() == []
    assert rig.say(Start(sequence=1), token(9)).out() == [(1, 9, 0, [1])]


def test_the_sequence_least_recently_told_of_goes_first() -> None:
    rig = Rig(max_sequences=2)
    rig.say(Start(sequence=1), Start(sequence=2), token(7), Start(sequence=3)).out()
    assert rig.rival.told[-3:] == [("end", 3), ("end", 2), ("begin", 3)]
    assert rig.say(token(8)).out() == [(1, 8, 0, [1])]


def test_a_lost_server_means_no_sequences(rig: Rig) -> None:
    rig.say(Start(sequence=1), token(7)).out()
    rig.mailbox.forget_all()
    rig.worker.work()
    assert rig.rival.told[-1] == ("end", 1)
    rig.say(token(8)).out()
    assert rig.worker.counters.failed == 1
