"""Corrections by what the full model's gates saw: what they come to, from what they are made, when there are none."""

import pytest
import torch
from torch import Tensor

from odmoe_model.quantize import Int4Weight
from odmoe_model.store import ExpertStore
from odmoe_predictor import shadow as shadow_module
from odmoe_predictor.feedback import Correction, Gate, Sights
from odmoe_predictor.shadow import Shadow
from support.predictor_plain import FullModel, PlainWeight
from support.stores import tiny_store
from support.tiny import FAMILIES

SEQUENCE = 7
PROMPT = [3, 17, 99, 4, 56, 23, 8, 120, 77, 31, 5, 66, 12, 90]
HIDDEN, EXPERTS, TOP_K, LAYERS = 32, 8, 2, 6


def linear_gate(weight_EH: Tensor) -> Gate:
    return lambda x_TH: (x_TH @ weight_EH.T).topk(TOP_K).indices


GATES = [linear_gate(torch.eye(EXPERTS))] * 2


def chosen(gate: Gate, x_1H: Tensor) -> list[int]:
    return sorted(gate(x_1H)[0].tolist())


@pytest.fixture(scope="module", params=FAMILIES)
def family_store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ExpertStore:
    return ExpertStore.open(tiny_store(request.param, tmp_path_factory.mktemp(request.param)), verify=False)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ExpertStore:
    return ExpertStore.open(tiny_store("mixtral", tmp_path_factory.mktemp("mixtral")), verify=False)


@pytest.fixture
def shadow(store: ExpertStore) -> Shadow:
    shadow = Shadow.load(store, quantize=PlainWeight, feedback=True)
    shadow.start(SEQUENCE)
    return shadow


# ------------------------------------------------------------------------------------------------------------- pure


@pytest.mark.parametrize("ahead", [1, 2, 4])
def test_an_error_that_lasts_over_the_layers_is_taken_out_whole(ahead: int) -> None:
    draw = torch.Generator().manual_seed(3)
    gates = [linear_gate(torch.randn(EXPERTS, HIDDEN, generator=draw)) for _ in range(LAYERS)]
    wrong = 0
    for position in range(40):
        sights = Sights()
        error_1H = 0.4 * torch.randn(1, HIDDEN, generator=draw)
        true = [torch.randn(1, HIDDEN, generator=draw) for _ in range(LAYERS)]
        named = [chosen(gate, x_1H - error_1H) for gate, x_1H in zip(gates, true, strict=True)]
        for layer, x_1H in enumerate(true):
            sights.note(position, layer, x_1H=x_1H - error_1H, experts=named[layer])
        for layer in range(LAYERS - ahead):
            target = layer + ahead
            correction = sights.correct(position, layer=layer, x_1H=true[layer], target=target, gates=gates)
            expected = chosen(gates[target], true[target])
            assert correction == Correction(experts=expected, instead=named[target])
            wrong += expected != named[target]
    assert wrong > 10, "or there was nothing to correct"


def test_a_correction_is_told_once_and_the_next_goes_on_from_it() -> None:
    sights = Sights()
    row_1H = torch.arange(8.0)[None]
    for layer in range(2):
        sights.note(5, layer, x_1H=row_1H, experts=[6, 7])
    there_1H = row_1H.flip(1)
    first = sights.correct(5, layer=0, x_1H=there_1H, target=1, gates=GATES)
    again = sights.correct(5, layer=0, x_1H=there_1H, target=1, gates=GATES)
    assert first == Correction(experts=[0, 1], instead=[6, 7])
    assert again == Correction(experts=[0, 1], instead=[0, 1])


def test_what_is_noted_is_a_copy() -> None:
    sights, row_1H = Sights(), torch.arange(8.0)[None]
    for layer in range(2):
        sights.note(5, layer, x_1H=row_1H, experts=[6, 7])
    row_1H.zero_()
    correction = sights.correct(5, layer=0, x_1H=torch.arange(8.0)[None], target=1, gates=GATES)
    assert correction == Correction(experts=[6, 7], instead=[6, 7])


@pytest.mark.parametrize(("first", "end", "kept"), [(5, 8, [5, 6, 7]), (6, 8, [6, 7]), (0, 6, [5]), (8, 9, [])])
def test_only_positions_of_use_are_kept(first: int, end: int, kept: list[int]) -> None:
    sights, row_1H = Sights(), torch.arange(8.0)[None]
    for position in (5, 6, 7):
        for layer in range(2):
            sights.note(position, layer, x_1H=row_1H, experts=[6, 7])
    sights.keep(first, end)
    assert len(sights) == 2 * len(kept)
    for position in (5, 6, 7):
        correction = sights.correct(position, layer=0, x_1H=row_1H, target=1, gates=GATES)
        assert (correction is not None) == (position in kept)


# ----------------------------------------------------------------------------------------------------- of a shadow


def align(shadow: Shadow, full: FullModel, token: int, *, rows: int) -> str:
    layers, tensors = full.export(rows)
    return shadow.align(SEQUENCE, position=full.length, tokens=[token], layers=layers, tensors=tensors)


def forecast(shadow: Shadow) -> None:
    assert shadow.forecast(SEQUENCE, on_routing=lambda layer, experts: None)


def correct(shadow: Shadow, full: FullModel, position: int, *, layer: int = 0, target: int = 1) -> Correction | None:
    return shadow.correct(SEQUENCE, position=position, layer=layer, x_1H=full.inputs[layer], target=target)


def test_every_familys_own_gates_are_asked(family_store: ExpertStore) -> None:
    """Moved by the difference at the layer itself, a shadow's row is the full model's: then so is its choice."""
    full, shadow = FullModel(family_store), Shadow.load(family_store, quantize=Int4Weight, feedback=True)
    assert shadow.corrects
    shadow.start(SEQUENCE)
    token, rows, wrong = full.step(PROMPT), len(PROMPT), 0
    for _ in range(16):
        position = full.length
        align(shadow, full, token, rows=rows)
        forecast(shadow)
        token, rows = full.step([token]), 1
        for layer, experts in full.routings.items():
            correction = correct(shadow, full, position, layer=layer, target=layer)
            assert correction is not None
            assert correction.experts == experts
            wrong += correction.instead != experts
    assert wrong, "a shadow as coarse as this one is wrong now and then"


def test_it_says_nothing_where_it_was_not_asked_to(store: ExpertStore) -> None:
    full, shadow = FullModel(store), Shadow.load(store, quantize=PlainWeight)
    shadow.start(SEQUENCE)
    align(shadow, full, full.step(PROMPT), rows=len(PROMPT))
    forecast(shadow)
    assert not shadow.corrects
    assert correct(shadow, full, full.length) is None


def test_a_family_without_known_gates_goes_without(store: ExpertStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_args: object, **_kwargs: object) -> None:
        raise shadow_module.RoutersError("not known here")

    monkeypatch.setattr(shadow_module, "routers_of", unknown)
    assert not Shadow.load(store, quantize=PlainWeight, feedback=True).corrects


def test_what_was_seen_for_another_token_is_void(shadow: Shadow, store: ExpertStore) -> None:
    full = FullModel(store)
    align(shadow, full, full.step(PROMPT), rows=len(PROMPT))
    forecast(shadow)
    assert shadow.go_on(SEQUENCE) == "forecast"
    forecast(shadow)
    position = len(PROMPT)
    token = full.step([int(shadow.token_at(SEQUENCE, position) or 0)])
    assert correct(shadow, full, position + 1) is not None
    assert align(shadow, full, (token + 1) % full.vocab_size, rows=1) == "forecast"
    assert correct(shadow, full, position + 1) is None, "until it is forecast again"
    assert correct(shadow, full, position) is None, "it is past"
    forecast(shadow)
    assert correct(shadow, full, position + 1) is not None


def test_a_forward_given_up_and_a_sequence_that_ended_leave_nothing(shadow: Shadow, store: ExpertStore) -> None:
    full = FullModel(store)
    align(shadow, full, full.step(PROMPT), rows=len(PROMPT))
    seen: dict[int, list[int]] = {}
    assert not shadow.forecast(SEQUENCE, on_routing=seen.__setitem__, is_stale=lambda: len(seen) == 2)
    position = full.length
    assert correct(shadow, full, position) is None
    forecast(shadow)
    assert correct(shadow, full, position) is not None
    shadow.end(SEQUENCE)
    assert correct(shadow, full, position) is None


@pytest.mark.parametrize("run_ahead", [0, 3])
def test_memory_is_bounded(shadow: Shadow, store: ExpertStore, run_ahead: int) -> None:
    full = FullModel(store)
    token, rows = full.step(PROMPT), len(PROMPT)
    for _ in range(12):
        if align(shadow, full, token, rows=rows) == "forecast":
            forecast(shadow)
        while shadow.length(SEQUENCE) <= full.length + run_ahead:
            shadow.go_on(SEQUENCE)
            forecast(shadow)
        assert len(shadow._sequences[SEQUENCE].sights) == (run_ahead + 1) * store.manifest.num_moe_layers
        token, rows = full.step([token]), 1
