"""Rivals of the shadow against cases worked out by hand, and each family's own gates against its own routing."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from odmoe_model import seam
from odmoe_model.routers import Router, RoutersError, load_routers, routers_of
from odmoe_model.store import ExpertStore
from odmoe_predictor.rivals.base import Rival, Shape
from odmoe_predictor.rivals.frequency import FrequencyRival
from odmoe_predictor.rivals.gate import GateRival
from odmoe_predictor.rivals.previous import PreviousRival
from odmoe_predictor.rivals.random import RandomRival
from odmoe_predictor.rivals.trained import ExpertScores, TrainedRival
from support.stores import local_experts, local_model, tiny_store
from support.tiny import FAMILIES

SHAPE = Shape(num_layers=3, num_experts=8, top_k=2)


def tell(rival: Rival, *layers: list[int], sequence: int = 1) -> None:
    """One token whose layers chose these."""
    rival.on_token(sequence)
    for layer, experts in enumerate(layers):
        rival.on_routed(sequence, layer, experts, None)


# ------------------------------------------------------------------------------------------------ random


def test_random_draws_distinct_experts_for_every_layer_and_the_same_again_from_its_seed() -> None:
    first, again, other = RandomRival(SHAPE, seed=1), RandomRival(SHAPE, seed=1), RandomRival(SHAPE, seed=2)
    forecasts = [first.on_token(1) for _ in range(50)]
    assert forecasts == [again.on_token(1) for _ in range(50)] != [other.on_token(1) for _ in range(50)]
    for forecast in forecasts:
        assert list(forecast) == [0, 1, 2]
        for experts in forecast.values():
            assert len(set(experts)) == 2
            assert experts == sorted(experts)
    assert {expert for forecast in forecasts for expert in forecast[0]} == set(range(8))
    assert first.on_routed(1, 0, [1, 2], None) == {}


# --------------------------------------------------------------------------------------------- frequency


def test_frequency_counts_each_layer_over_all_sequences() -> None:
    rival = FrequencyRival(SHAPE)
    assert rival.on_token(1) == {}, "nothing is known yet"
    tell(rival, [5, 1], [0, 7], sequence=1)
    tell(rival, [5, 2], [7, 6], sequence=2)
    rival.end(1)
    tell(rival, [2, 4], sequence=2)
    assert rival.on_token(3) == {0: [2, 5], 1: [0, 7]}, "5 and 2 twice; 7 twice, and 0 before 6"


# ---------------------------------------------------------------------------------------------- previous


def test_previous_repeats_each_sequences_own_last_token() -> None:
    rival = PreviousRival()
    for sequence in (1, 2):
        rival.begin(sequence)
        assert rival.on_token(sequence) == {}
    tell(rival, [5, 1], [0, 7], sequence=1)
    tell(rival, [3, 4], [6, 2], sequence=2)
    assert rival.on_token(1) == {0: [1, 5], 1: [0, 7]}
    tell(rival, [0, 1], sequence=1)
    assert rival.on_token(1) == {0: [0, 1], 1: [0, 7]}
    assert rival.on_token(2) == {0: [3, 4], 1: [2, 6]}
    assert rival.held_bytes == 8 * 8
    rival.begin(1)
    assert rival.on_token(1) == {}, "it begins anew"
    rival.end(2)
    rival.end(2)
    assert rival.held_bytes == 0


# -------------------------------------------------------------------------------------------------- gate


class Calls:
    """A seam handler that remembers what each layer's gate saw and chose."""

    def __init__(self, store: ExpertStore) -> None:
        self._experts = local_experts(store)
        self.calls: list[seam.ExpertsCall] = []

    def __call__(self, call: seam.ExpertsCall) -> Tensor:
        self.calls.append(call)
        return self._experts(call)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_familys_gates_choose_what_the_model_chose(family: str, tmp_path: Path) -> None:
    store = ExpertStore.open(tiny_store(family, tmp_path), verify=False)
    model, calls = local_model(store), Calls(store)
    seam.install(model, calls)
    with torch.inference_mode():
        model(input_ids=torch.tensor([[3, 17, 99, 4, 56, 23, 8, 120, 77, 31, 5]]))
        routers = load_routers(store)
        assert len(routers) == len(calls.calls) == store.manifest.num_moe_layers
        for router, call in zip(routers, calls.calls, strict=True):
            assert torch.equal(router(call.x_TH), call.index_TK)
        rival = GateRival.load(store)
        (ahead,) = rival.on_routed(1, 0, [0], calls.calls[0].x_TH).items()
    index_TK = routers[1](calls.calls[0].x_TH)
    assert ahead == (1, sorted(set(index_TK.flatten().tolist())))
    assert rival.held_bytes > store.manifest.num_moe_layers * store.manifest.num_experts * store.manifest.hidden_size


class FixedGate(nn.Module):
    """A gate whose experts' weights are known."""

    def __init__(self, weight_EH: list[list[float]]) -> None:
        super().__init__()
        self.weight_EH = nn.Parameter(torch.tensor(weight_EH))

    def forward(self, x_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (x_TH, *(x_TH @ self.weight_EH.T).topk(2))


def test_gate_applies_the_later_layers_gate_to_the_rows_it_is_given() -> None:
    weights = [[[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]], [[0.0, 3.0], [0.0, 2.0], [0.0, 1.0]], [[9.0, 0.0], [0, 1], [0, 2]]]
    routers = [Router(FixedGate(weight), ()) for weight in weights]
    near, far = GateRival(routers, look_ahead=1), GateRival(routers, look_ahead=2)
    x_TH = torch.tensor([[1.0, 1.0]])
    assert near.on_token(1) == far.on_token(1) == {}
    assert near.on_routed(1, 0, [0], x_TH) == {1: [0, 1]}
    assert near.on_routed(1, 1, [0], x_TH) == {2: [0, 2]}
    assert near.on_routed(1, 2, [0], x_TH) == {}, "there is no layer after it"
    assert far.on_routed(1, 0, [0], x_TH) == {2: [0, 2]}
    assert far.on_routed(1, 1, [0], x_TH) == {}
    both_rows = torch.tensor([[1.0, 0.1], [-1.0, 1.0]])
    assert near.on_routed(1, 1, [0], both_rows) == {2: [0, 1, 2]}, "what any row of the step needs"
    assert near.held_bytes == 3 * 6 * 4
    with pytest.raises(ValueError, match="inputs"):
        near.on_routed(1, 0, [0], None)


@pytest.mark.parametrize("look_ahead", [0, 3])
def test_gate_refuses_a_look_ahead_that_forecasts_nothing(look_ahead: int) -> None:
    routers = [Router(FixedGate([[1.0]]), ())] * 3
    with pytest.raises(ValueError, match=f"look-ahead of {look_ahead} layers forecasts nothing in a model of 3"):
        GateRival(routers, look_ahead=look_ahead)


def test_a_family_whose_gates_are_unknown_is_named(tmp_path: Path) -> None:
    model = local_model(ExpertStore.open(tiny_store("mixtral", tmp_path), verify=False))
    for block in [module for module in model.modules() if hasattr(module, "experts")]:
        block.chooser = block.gate
        del block.gate
    with pytest.raises(RoutersError, match="gates of mixtral models are not known"):
        routers_of(model, family="mixtral")


# ----------------------------------------------------------------------------------------------- trained


class Asked(ExpertScores):
    """Remembers what it was asked, and always likes the layer's number and 7 best."""

    def __init__(self, *, look_ahead: int) -> None:
        super().__init__(SHAPE, look_ahead=look_ahead, width=4)
        self.asked: list[tuple[int, list[int]]] = []

    def forward(self, index_BI: Tensor, layer_B: Tensor) -> Tensor:
        (layer,) = layer_B.tolist()
        self.asked.append((layer, index_BI[0].tolist()))
        return torch.eye(8)[[layer]] + torch.eye(8)[[7]]


def test_trained_sees_the_last_token_and_this_ones_layers_so_far() -> None:
    model = Asked(look_ahead=1)
    rival = TrainedRival(model)
    rival.begin(1)
    rival.begin(2)
    assert rival.on_token(1) == {0: [0, 7]}
    assert rival.on_routed(1, 0, [5, 1], None) == {1: [1, 7]}
    assert rival.on_routed(1, 1, [0, 6], None) == {2: [2, 7]}
    assert rival.on_routed(1, 2, [3, 4], None) == {}
    rival.on_token(2)
    rival.on_token(1)
    last, now, layer = 0, 24, 48
    assert model.asked == [
        (0, [layer]),
        (1, [now + 5, now + 1, layer + 1]),
        (2, [now + 5, now + 1, now + 8, now + 8 + 6, layer + 2]),
        (0, [layer]),
        (0, [last + 5, last + 1, last + 8, last + 8 + 6, last + 16 + 3, last + 16 + 4, layer]),
    ]
    rival.end(1)
    with pytest.raises(KeyError):
        rival.on_token(1)


def test_trained_looking_further_ahead_forecasts_more_layers_at_the_token() -> None:
    rival = TrainedRival(Asked(look_ahead=2))
    rival.begin(1)
    assert rival.on_token(1) == {0: [0, 7], 1: [1, 7]}
    assert rival.on_routed(1, 0, [5, 1], None) == {2: [2, 7]}
    assert rival.on_routed(1, 1, [5, 1], None) == {}
