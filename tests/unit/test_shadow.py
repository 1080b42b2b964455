"""The shadow: forecasts, alignment, rollback and giving up early, on tiny models of every family."""

import pytest
import torch

from odmoe_model.kvcache import CacheError, export_cache, truncate_cache
from odmoe_model.quantize import Int8Weight, Quantizer
from odmoe_model.store import ExpertStore
from odmoe_predictor.shadow import Aligned, SequenceError, Shadow
from support.predictor_plain import FullModel, PlainWeight, Routings, recall
from support.stores import tiny_store
from support.tiny import FAMILIES

SEQUENCE = 7
PROMPT = [3, 17, 99, 4, 56, 23, 8, 120, 77, 31, 5, 66, 12, 90]


@pytest.fixture(scope="module", params=FAMILIES)
def family_store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ExpertStore:
    return ExpertStore.open(tiny_store(request.param, tmp_path_factory.mktemp(request.param)), verify=False)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ExpertStore:
    return ExpertStore.open(tiny_store("mixtral", tmp_path_factory.mktemp("mixtral")), verify=False)


@pytest.fixture
def shadow(store: ExpertStore) -> Shadow:
    shadow = Shadow.load(store, quantize=PlainWeight)
    shadow.start(SEQUENCE)
    return shadow


def forecast(shadow: Shadow) -> Routings:
    routings: Routings = {}
    assert shadow.forecast(SEQUENCE, on_routing=routings.__setitem__)
    return routings


def aligned_recalls(store: ExpertStore, quantize: Quantizer, *, steps: int) -> list[float]:
    """Recall of each decode step with token and KV aligned every step, the prompt's KV coming from the full model."""
    full, shadow = FullModel(store), Shadow.load(store, quantize=quantize)
    shadow.start(SEQUENCE)
    token, rows, recalls = full.step(PROMPT), len(PROMPT), []
    for _ in range(steps):
        layers, tensors = full.export(rows)
        shadow.align(SEQUENCE, position=full.length, tokens=[token], layers=layers, tensors=tensors)
        routings = forecast(shadow)
        token, rows = full.step([token]), 1
        recalls.append(recall(routings, full.routings))
        assert all(len(experts) == store.manifest.top_k for experts in routings.values())
    return recalls


def test_unquantised_shadow_is_always_right(family_store: ExpertStore) -> None:
    assert aligned_recalls(family_store, PlainWeight, steps=12) == [1.0] * 12


def test_int8_shadow_is_nearly_always_right(family_store: ExpertStore) -> None:
    recalls = aligned_recalls(family_store, Int8Weight, steps=30)
    assert sum(recalls) / len(recalls) > 0.93


def test_nothing_of_a_model_is_left_out_of_the_report(family_store: ExpertStore) -> None:
    manifest, report = family_store.manifest, Shadow.load(family_store).report
    expert_bytes = sum(field.size_bytes for field in manifest.record) * manifest.num_experts * manifest.num_moe_layers
    other_bytes = sum(tensor.nbytes for tensor in family_store.non_expert().values())
    stored = {entry.what: entry.stored_bytes for entry in report.entries if "expert" in entry.what}
    assert sum(stored.values()) == expert_bytes
    # The model has tables the store has not (rotary frequencies), never the other way round.
    assert 0 <= report.stored_bytes - expert_bytes - other_bytes < 2048
    assert 0.25 < report.ratio_to_fp32() < 0.30
    assert all(entry.reason for entry in report.entries if entry.treatment != "int8")


def test_prompt_may_be_prefilled_by_the_shadow_itself(store: ExpertStore, shadow: Shadow) -> None:
    full = FullModel(store)
    token = full.step(PROMPT)
    shadow.align(SEQUENCE, position=0, tokens=PROMPT)
    assert forecast(shadow) == full.routings
    for _ in range(5):
        shadow.align(SEQUENCE, position=full.length, tokens=[token])
        routings = forecast(shadow)
        token = full.step([token])
        assert routings == full.routings


def test_forecast_of_several_tokens_is_their_union(store: ExpertStore, shadow: Shadow) -> None:
    full = FullModel(store)
    full.step(PROMPT)
    layers, tensors = full.export(len(PROMPT))
    shadow.align(SEQUENCE, position=len(PROMPT), tokens=[1, 2, 3], layers=layers, tensors=tensors)
    routings = forecast(shadow)
    full.step([1, 2, 3])
    assert routings == full.routings
    assert max(map(len, routings.values())) > store.manifest.top_k


def test_own_row_of_a_wrong_token_is_replaced_by_alignment(store: ExpertStore, shadow: Shadow) -> None:
    full = FullModel(store)
    token = full.step(PROMPT)
    shadow.align(SEQUENCE, position=0, tokens=PROMPT)
    forecast(shadow)
    shadow.align(SEQUENCE, position=len(PROMPT), tokens=[(token + 1) % 128])
    forecast(shadow)
    token = full.step([token])
    layers, tensors = full.export(1)
    shadow.align(SEQUENCE, position=full.length, tokens=[token], layers=layers, tensors=tensors)
    routings = forecast(shadow)
    full.step([token])
    assert routings == full.routings


def test_skipped_alignments_still_bring_their_rows(store: ExpertStore, shadow: Shadow) -> None:
    full = FullModel(store)
    token, rows = full.step(PROMPT), len(PROMPT)
    for _ in range(4):
        layers, tensors = full.export(rows)
        shadow.align(SEQUENCE, position=full.length, tokens=[token], layers=layers, tensors=tensors)
        token, rows = full.step([token]), 1
    layers, tensors = full.export(1)
    shadow.align(SEQUENCE, position=full.length, tokens=[token], layers=layers, tensors=tensors)
    routings = forecast(shadow)
    full.step([token])
    assert routings == full.routings


def test_skipped_tokens_without_rows_are_fed_with_the_next(store: ExpertStore, shadow: Shadow) -> None:
    full = FullModel(store)
    token = full.step(PROMPT)
    layers, tensors = full.export(len(PROMPT))
    shadow.align(SEQUENCE, position=full.length, tokens=[token], layers=layers, tensors=tensors)
    token = full.step([token])
    shadow.align(SEQUENCE, position=full.length, tokens=[token])
    routings = forecast(shadow)
    full.step([token])
    assert routings == full.routings


def test_other_tokens_take_the_place_of_what_came_after(store: ExpertStore, shadow: Shadow) -> None:
    shadow.align(SEQUENCE, position=0, tokens=PROMPT)
    forecast(shadow)
    shadow.align(SEQUENCE, position=len(PROMPT), tokens=[1, 2, 3, 4])
    forecast(shadow)
    shadow.align(SEQUENCE, position=len(PROMPT) + 1, tokens=[50])
    assert shadow.length(SEQUENCE) == len(PROMPT) + 1
    routings = forecast(shadow)
    full = FullModel(store)
    full.step([*PROMPT, 1])
    full.step([50])
    assert routings == full.routings


def test_forward_given_up_midway_leaves_no_trace(family_store: ExpertStore) -> None:
    full, shadow = FullModel(family_store), Shadow.load(family_store, quantize=PlainWeight)
    shadow.start(SEQUENCE)
    token = full.step(PROMPT)
    layers, tensors = full.export(len(PROMPT))
    shadow.align(SEQUENCE, position=full.length, tokens=[token], layers=layers, tensors=tensors)
    seen: Routings = {}
    assert not shadow.forecast(SEQUENCE, on_routing=seen.__setitem__, is_stale=lambda: len(seen) == 1)
    assert len(seen) == 1
    assert shadow.length(SEQUENCE) == len(PROMPT)
    token = full.step([token])
    layers, tensors = full.export(1)
    shadow.align(SEQUENCE, position=full.length, tokens=[token], layers=layers, tensors=tensors)
    routings = forecast(shadow)
    full.step([token])
    assert routings == full.routings


def test_failure_inside_the_model_puts_the_cache_back(shadow: Shadow) -> None:
    shadow.align(SEQUENCE, position=0, tokens=PROMPT)

    def fail(layer: int, _: list[int]) -> None:
        if layer == 1:
            raise RuntimeError("no such luck")

    with pytest.raises(RuntimeError, match="no such luck"):
        shadow.forecast(SEQUENCE, on_routing=fail)
    assert shadow.length(SEQUENCE) == 0
    assert len(forecast(shadow)) == 3


def align(shadow: Shadow, full: FullModel, token: int, *, rows: int = 1) -> Aligned:
    """Token and KV, as the server sends them."""
    layers, tensors = full.export(rows)
    return shadow.align(SEQUENCE, position=full.length, tokens=[token], layers=layers, tensors=tensors)


def go_on(shadow: Shadow) -> tuple[int, Routings]:
    """The shadow's own next token and what it forecasts for it."""
    assert shadow.go_on(SEQUENCE) == "forecast"
    guess = shadow.token_at(SEQUENCE, shadow.length(SEQUENCE))
    assert guess is not None
    return guess, forecast(shadow)


def test_forecast_ahead_on_the_right_token_is_kept(family_store: ExpertStore) -> None:
    """Each position is forecast before its token is known."""
    full, shadow = FullModel(family_store), Shadow.load(family_store, quantize=PlainWeight)
    shadow.start(SEQUENCE)
    token = full.step(PROMPT)
    assert align(shadow, full, token, rows=len(PROMPT)) == "forecast"
    routings = forecast(shadow)
    for _ in range(6):
        guess, ahead = go_on(shadow)
        token = full.step([token])
        assert (token, full.routings) == (guess, routings), "the shadow is a second full model"
        assert align(shadow, full, token) == "known"
        assert shadow.length(SEQUENCE) == full.length + 1
        assert forecast(shadow) == {}
        routings = ahead


def test_rows_of_the_full_model_go_underneath_what_was_forecast_ahead(family_store: ExpertStore) -> None:
    full, shadow = FullModel(family_store), Shadow.load(family_store)
    shadow.start(SEQUENCE)
    token = full.step(PROMPT)
    align(shadow, full, token, rows=len(PROMPT))
    forecast(shadow)
    guess, _ = go_on(shadow)
    go_on(shadow)
    full.step([token])
    assert align(shadow, full, guess) == "known"
    assert shadow.length(SEQUENCE) == full.length + 2
    truncate_cache(shadow._sequences[SEQUENCE].cache, length=full.length)
    _, own = export_cache(shadow._sequences[SEQUENCE].cache, rows=full.length)
    _, theirs = full.export(full.length)
    # Of int8 not a bit would be the same.
    assert all(torch.equal(mine[..., -1:, :], other[..., -1:, :]) for mine, other in zip(own, theirs, strict=True))


def test_forecast_ahead_on_a_wrong_token_is_undone(family_store: ExpertStore) -> None:
    full, shadow = FullModel(family_store), Shadow.load(family_store, quantize=PlainWeight)
    shadow.start(SEQUENCE)
    token = full.step(PROMPT)
    align(shadow, full, token, rows=len(PROMPT))
    for _ in range(4):
        forecast(shadow)
        guess, _ = go_on(shadow)
        go_on(shadow)
        full.step([token])
        token = (guess + 1) % full.vocab_size  # as if it had been sampled
        assert align(shadow, full, token) == "forecast"
        assert shadow.length(SEQUENCE) == full.length
        routings = forecast(shadow)
        full.step([token])
        assert routings == full.routings
        token = (token + 7) % full.vocab_size
        assert align(shadow, full, token) == "forecast"


def test_deep_run_ahead_stands_when_several_tokens_are_accepted_at_once(family_store: ExpertStore) -> None:
    """Sixteen positions ahead; what the full model takes in one step costs no forecast anew, and a wrong token in the
    midst of them only those behind it."""
    full, shadow = FullModel(family_store), Shadow.load(family_store, quantize=PlainWeight)
    shadow.start(SEQUENCE)
    token = full.step(PROMPT)
    assert align(shadow, full, token, rows=len(PROMPT)) == "forecast"
    forecasts = {full.length: forecast(shadow)}
    for accepted in (9, 1, 5, 9):
        while shadow.length(SEQUENCE) <= full.length + 16:
            position = shadow.length(SEQUENCE)
            forecasts[position] = go_on(shadow)[1]
        for _ in range(accepted):
            position, drafted = full.length, shadow.token_at(SEQUENCE, full.length)
            assert drafted in (token, None), "it is a second full model"
            token = full.step([token])
            assert forecasts[position] == full.routings
        assert align(shadow, full, token, rows=accepted) == "known"
        assert shadow.length(SEQUENCE) == full.length - accepted + 17
    wrong = (token + 1) % full.vocab_size
    assert align(shadow, full, wrong, rows=1) == "forecast"
    assert shadow.length(SEQUENCE) == full.length
    routings = forecast(shadow)
    full.step([wrong])
    assert routings == full.routings


def test_without_tokens_the_shadow_goes_on_with_its_own(store: ExpertStore, shadow: Shadow) -> None:
    full = FullModel(store)
    token = full.step(PROMPT)
    align(shadow, full, token, rows=len(PROMPT))
    routings = forecast(shadow)
    for with_cache in (False, True, False):
        token = full.step([token])
        assert routings == full.routings
        layers, tensors = full.export(2) if with_cache else ([], [])
        asked = shadow.align(SEQUENCE, position=full.length, tokens=[], layers=layers, tensors=tensors)
        assert asked == "forecast"
        assert shadow.token_at(SEQUENCE, full.length) == token
        routings = forecast(shadow)


def test_own_token_is_not_taken_from_another_lineage(store: ExpertStore, shadow: Shadow) -> None:
    """What the shadow would say after a token that was undone is nothing to go on with."""
    full = FullModel(store)
    token = full.step(PROMPT)
    align(shadow, full, token, rows=len(PROMPT))
    forecast(shadow)
    guess, _ = go_on(shadow)
    token = full.step([token])
    assert align(shadow, full, (guess + 1) % 128) == "forecast"
    full.step([(guess + 1) % 128])
    layers, tensors = full.export(1)
    asked = shadow.align(SEQUENCE, position=full.length, tokens=[], layers=layers, tensors=tensors)
    assert asked == "nothing"
    assert forecast(shadow) == {}


def test_sequences_do_not_mix(store: ExpertStore) -> None:
    shadow = Shadow.load(store, quantize=PlainWeight)
    fulls = {sequence: FullModel(store) for sequence in (1, 2)}
    prompts = {1: PROMPT, 2: [9, 9, 40]}
    for sequence, full in fulls.items():
        shadow.start(sequence)
        full.step(prompts[sequence])
        layers, tensors = full.export(full.length)
        shadow.align(sequence, position=full.length, tokens=[5], layers=layers, tensors=tensors)
    for sequence, full in fulls.items():
        routings: Routings = {}
        shadow.forecast(sequence, on_routing=routings.__setitem__)
        full.step([5])
        assert routings == full.routings
    assert shadow.num_sequences == 2
    assert shadow.caches_bytes > 0
    shadow.end(1)
    shadow.end(1)
    with pytest.raises(SequenceError, match="not known"):
        shadow.align(1, position=0, tokens=[1])
    shadow.forget()
    assert shadow.caches_bytes == 0


def test_number_of_sequences_is_bounded(store: ExpertStore) -> None:
    shadow = Shadow.load(store, quantize=PlainWeight, max_sequences=2)
    shadow.start(1)
    shadow.start(2)
    shadow.align(1, position=0, tokens=[4])
    shadow.start(3)
    assert shadow.num_sequences == 2
    assert shadow.length(1) == 0
    with pytest.raises(SequenceError, match="2 is not known"):
        shadow.length(2)


@pytest.mark.parametrize("token", [-1, 128])
def test_token_outside_the_vocabulary_is_refused(shadow: Shadow, token: int) -> None:
    with pytest.raises(SequenceError, match="vocabulary"):
        shadow.align(SEQUENCE, position=0, tokens=[token])


def test_gap_in_the_inputs_is_refused(shadow: Shadow) -> None:
    shadow.align(SEQUENCE, position=3, tokens=[1])
    with pytest.raises(SequenceError, match="position 0"):
        forecast(shadow)


def test_cache_that_does_not_follow_is_refused(store: ExpertStore, shadow: Shadow) -> None:
    full = FullModel(store)
    full.step(PROMPT)
    layers, tensors = full.export(1)
    with pytest.raises(CacheError):
        shadow.align(SEQUENCE, position=full.length, tokens=[1], layers=layers, tensors=tensors)
    with pytest.raises(SequenceError, match="for 2"):
        shadow.align(SEQUENCE, position=2, tokens=[1], layers=layers, tensors=tensors)
    assert shadow.length(SEQUENCE) == 0


def test_alignment_without_tokens_forecasts_nothing(shadow: Shadow) -> None:
    shadow.align(SEQUENCE, position=0, tokens=PROMPT)
    shadow.align(SEQUENCE, position=len(PROMPT), tokens=[])
    assert forecast(shadow) == {}


def test_experts_are_quantised_one_at_a_time(store: ExpertStore) -> None:
    """The quantiser never sees more than one expert's matrix."""
    shapes = []

    def watching(weight_NK: torch.Tensor) -> Int8Weight:
        shapes.append(tuple(weight_NK.shape))
        return Int8Weight(weight_NK)

    Shadow.load(store, quantize=watching)
    assert {len(shape) for shape in shapes} == {2}
    assert shapes.count((2 * 96, 64)) == store.manifest.num_experts * store.manifest.num_moe_layers
