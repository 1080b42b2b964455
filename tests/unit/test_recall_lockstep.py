"""Recall measured in lockstep forecasts exactly what the real shadow forecasts one sequence at a time.

The shadows here are float32 with noise in every weight, so that they err, and often; sums of another order differ by a
millionth, which moves no expert of these routers: not one disagreement is allowed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from odmoe_model.quantize import QuantizedWeight
from odmoe_model.store import ExpertStore
from odmoe_predictor.parts import load_parts
from odmoe_predictor.recall.alignment import Alignment
from odmoe_predictor.recall.lockstep import full_model, shadow_model
from odmoe_predictor.recall.record import Record, record_answers
from odmoe_predictor.recall.replay import replay
from odmoe_predictor.recall.tally import Tally, num_hits_b
from odmoe_predictor.shadow import Shadow
from odmoe_server.engine.align import Periods, Shadowed
from support.predictor_plain import FullModel, PlainWeight, Routings, recall
from support.stores import tiny_store

PROMPTS = [[3, 17, 99, 4], [5, 8], [9, 12, 40, 77, 31, 2, 64], [100, 101, 102], [7, 7, 7, 7, 7], [55]]
TOKENS = 14
ALIGNMENTS = [
    Alignment(token=1, kv=1),
    Alignment(token=1, kv=None),
    Alignment(token=None, kv=1),
    Alignment(token=None, kv=None),
    Alignment(token=2, kv=4),
    Alignment(token=4, kv=2),
    Alignment(token=1, kv=1, prompt_kv="own"),
    Alignment(token=None, kv=8, prompt_kv="own"),
]


def noisy(weight_NK: Tensor) -> QuantizedWeight:
    """A weight of a shadow that is wrong now and then."""
    noise_NK = torch.randn(weight_NK.shape, generator=torch.Generator().manual_seed(weight_NK.numel()))
    return PlainWeight(weight_NK + 0.02 * noise_NK)


@dataclass(frozen=True)
class Answer:
    """One sequence as the product would decode it: tokens, and the routings of each."""

    tokens: list[int]
    routings: list[Routings]


def answer(store: ExpertStore, prompt: list[int], *, stops: set[int]) -> Answer:
    full, tokens, routings = FullModel(store), [], []
    token = full.step(prompt)
    while token not in stops and len(tokens) < TOKENS:
        tokens.append(token)
        token = full.step([token])
        routings.append(full.routings)
    return Answer(tokens, routings)


def forecasts(
    shadow: Shadow, full: FullModel, *, prompt: list[int], said: Answer, alignment: Alignment
) -> Iterator[Routings]:
    """What the real shadow forecasts, brought in line by the server's own rules."""
    state = Shadowed()
    periods = Periods(token=alignment.token, kv=alignment.kv, prompt=alignment.prompt_kv)
    shadow.start(1)
    if state.align(predictor=7, position=0, num_fresh=len(prompt), num_prompt=len(prompt), periods=periods):
        shadow.align(1, position=0, tokens=prompt)
        shadow.forecast(1, on_routing=lambda layer, experts: None)
    full.step(prompt)
    for token in said.tokens:
        due = state.align(predictor=7, position=full.length, num_fresh=1, num_prompt=len(prompt), periods=periods)
        assert due is not None
        layers, tensors = full.export(due.rows) if due.rows else ([], [])
        tokens = [token] if due.token else []
        shadow.align(1, position=full.length, tokens=tokens, layers=layers, tensors=tensors)
        forecast: Routings = {}
        shadow.forecast(1, on_routing=forecast.__setitem__)
        yield forecast
        full.step([token])


def in_lockstep(record: Record, step: int, routed_LbK: Tensor, *, row: int) -> Routings | None:
    """What a step of a batch has of one prompt, unless that has stopped."""
    there = record.steps[step].rows_b.tolist()
    if row not in there or not record.steps[step].alive_b[there.index(row)]:
        return None
    return {layer: sorted(experts) for layer, experts in enumerate(routed_LbK[:, there.index(row)].tolist())}


@pytest.fixture(scope="module", params=["mixtral", "qwen2_moe", "gpt_oss", "deepseek_v2"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ExpertStore:
    return ExpertStore.open(tiny_store(request.param, tmp_path_factory.mktemp("recall")), verify=False)


def stops_of(store: ExpertStore) -> set[int]:
    """What some answers come to early, so that sequences leave the batch."""
    return {answer(store, PROMPTS[0], stops=set()).tokens[3], answer(store, PROMPTS[2], stops=set()).tokens[7]}


def test_same_answers_and_forecasts_as_one_sequence_at_a_time(store: ExpertStore) -> None:
    stops = stops_of(store)
    answers = [answer(store, prompt, stops=stops) for prompt in PROMPTS]
    record = record_answers(full_model(store), PROMPTS, tokens=TOKENS, stops=stops)
    assert record.num_alive == [sum(len(each.tokens) > n for each in answers) for n in range(len(record.steps))]
    assert len(record.steps[-1].rows_b) < len(PROMPTS), "nobody left the batch"
    seen: list[Tensor] = []
    model = shadow_model(load_parts(store, quantize=noisy))
    replayed = replay(model, record, ALIGNMENTS, on_forecast=lambda step, routed_LAbK: seen.append(routed_LAbK))
    shadow = Shadow.load(store, quantize=noisy)
    for place, alignment in enumerate(ALIGNMENTS):
        shares = []
        for row, (prompt, said) in enumerate(zip(PROMPTS, answers, strict=True)):
            full = FullModel(store)
            expected = list(forecasts(shadow, full, prompt=prompt, said=said, alignment=alignment))
            got = [in_lockstep(record, n, routed_LAbK[:, place], row=row) for n, routed_LAbK in enumerate(seen)]
            assert [each for each in got if each is not None] == expected, (alignment, row)
            shares += [recall(each, needed) for each, needed in zip(expected, said.routings, strict=True)]
        # Every token needs equally many experts, so that the mean is the share of all.
        assert replayed.tallies[place].recall == pytest.approx(sum(shares) / len(shares))
    assert all(0 <= tally.agreed < tally.guesses for tally in replayed.tallies), "it is noisy"
    assert replayed.tallies[0].guesses == sum(record.num_alive[1:])
    recalls = {tally.recall for tally in replayed.tallies}
    assert max(recalls) < 1.0, "a shadow that is always right would prove nothing"
    assert len(recalls) >= 5, "alignments that make no difference would prove nothing"


def test_copy_of_the_model_is_always_right(store: ExpertStore) -> None:
    record = record_answers(full_model(store), PROMPTS, tokens=TOKENS, stops=stops_of(store))
    model = shadow_model(load_parts(store, quantize=PlainWeight))
    (tally,) = replay(model, record, [Alignment(token=None, kv=None)]).tallies
    assert tally.recall == tally.agreement == 1.0
    assert tally.guesses == sum(record.num_alive[1:])
    assert tally.curve == [1.0] * len(record.steps)


def test_inputs_are_what_the_gates_saw(store: ExpertStore) -> None:
    record = record_answers(full_model(store), PROMPTS, tokens=3, stops=set(), with_inputs=True)
    hidden_size = store.manifest.hidden_size
    assert [x_bH.shape for x_bH in record.steps[0].inputs_LbH] == [
        (len(PROMPTS), hidden_size) for _ in range(store.manifest.num_moe_layers)
    ]
    assert not record_answers(full_model(store), PROMPTS, tokens=1, stops=set()).steps[0].inputs_LbH


def test_cache_with_more_than_keys_and_values_is_refused(tmp_path: Path) -> None:
    store = ExpertStore.open(tiny_store("lfm2_moe", tmp_path), verify=False)
    with pytest.raises(ValueError, match="LinearAttentionLayer"):
        record_answers(full_model(store), PROMPTS, tokens=1, stops=set())


def test_tally_counts_what_the_paper_counts() -> None:
    forecast_LbK = torch.tensor([[[0, 1], [2, 3]], [[4, 5], [6, 7]]])
    needed_LbK = torch.tensor([[[1, 0], [2, 5]], [[4, 6], [0, 1]]])
    assert num_hits_b(forecast_LbK, needed_LbK).tolist() == [3, 1]
    tally = Tally(hits_N=[8, 3], alive_N=[2, 1], num_needed=4)
    assert tally.recall == 11 / 12
    assert tally.curve == [1.0, 0.75]
    assert tally.agreement is None
    assert Tally(hits_N=[8, 3], alive_N=[2, 1], num_needed=4, agreed=1, guesses=4).agreement == 0.25
