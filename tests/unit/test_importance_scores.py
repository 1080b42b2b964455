"""All experts' scores against what each family's gate itself chooses, and swaps on tensors worked out by hand."""

from pathlib import Path

import pytest
import torch

from odmoe_model.routers import routers_of
from odmoe_model.scores import Scorer, Scores
from odmoe_model.store import ExpertStore
from odmoe_server.importance.substitution import Swap
from odmoe_server.importance.swapping import Routed, serve
from support.stores import local_model, tiny_store
from support.tiny import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gates_choice_is_what_scores_best_and_its_weights_are_in_the_scores_proportion(
    tmp_path: Path, family: str
) -> None:
    store = ExpertStore.open(tiny_store(family, tmp_path), verify=False)
    generator = torch.Generator().manual_seed(3)
    for router in routers_of(local_model(store), family=store.manifest.model_type):
        scorer = Scorer(router, family=store.manifest.model_type)
        with torch.inference_mode():
            for buffer in (scorer.bias,) if scorer.bias is not None else ():
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
            x_TH = torch.randn(40, int(store.manifest.config["hidden_size"]), generator=generator)
            logits_TE, index_TK = router.routed(x_TH)
            weight_TK = router.module(x_TH, *router.extra)[1]
            scores = scorer(logits_TE)
        num_chosen = index_TK.shape[1]
        best_TK = scores.score_TE.topk(num_chosen, dim=-1).indices
        assert torch.equal(best_TK.sort().values, index_TK.sort().values)
        if family == "phimoe":  # its weights of the first and the second expert have different units
            continue
        unit_T1 = (weight_TK / scores.weight_TE.gather(1, index_TK)).float()
        torch.testing.assert_close(unit_T1, unit_T1[:, :1].expand_as(unit_T1), rtol=1e-3, atol=1e-3)
        if scorer.normalised:
            sums_T = weight_TK.float().sum(-1)
            torch.testing.assert_close(sums_T, sums_T[:1].expand_as(sums_T), rtol=1e-3, atol=1e-3)


def test_without_its_groups_a_gate_would_be_told_wrong(tmp_path: Path) -> None:
    """The check above sees closed groups at all: with them open, some row's best experts are others."""
    store = ExpertStore.open(tiny_store("deepseek_v3", tmp_path), verify=False)
    router = routers_of(local_model(store), family="deepseek_v3")[0]
    with torch.inference_mode():
        logits_TE, index_TK = router.routed(torch.randn(40, 64, generator=torch.Generator().manual_seed(3)))
    open_TK = logits_TE.sigmoid().topk(index_TK.shape[1], dim=-1).indices
    assert not torch.equal(open_TK.sort().values, index_TK.sort().values)


# -------------------------------------------------------------------------------------------------- swaps on tensors

SCORE_TE = torch.tensor([[0.30, 0.22, 0.20, 0.15, 0.13, 0.0], [0.30, 0.22, 0.20, 0.15, 0.13, 0.0]])


def routed(*, alpha: float, unit: float) -> Routed:
    """Two tokens that chose experts 1 and 0; `unit` is what a weight of 1 comes to after normalisation."""
    index_TK = torch.tensor([[0, 1], [1, 0]])
    weight_TK = SCORE_TE.gather(1, index_TK) * unit
    return Routed(index_TK=index_TK, weight_TK=weight_TK, scores=Scores(SCORE_TE, SCORE_TE), alpha=alpha)


def test_a_substitute_has_the_weight_its_gate_gives_it() -> None:
    (served,) = serve([routed(alpha=0.3, unit=2.5)], at_hand={0, 3}, normalised=False)
    assert served.index_TK.tolist() == [[0, 3], [3, 0]]
    torch.testing.assert_close(served.weight_TK, torch.tensor([[0.75, 0.375], [0.375, 0.75]]))
    assert served.swaps == ((Swap(1, 1, 3),), (Swap(0, 1, 3),))
    assert served.num_substituted == 2


def test_a_family_that_holds_weights_to_a_sum_gets_that_sum() -> None:
    (served,) = serve([routed(alpha=0.3, unit=1 / 0.52)], at_hand={0, 3}, normalised=True)
    torch.testing.assert_close(served.weight_TK, torch.tensor([[0.30, 0.15], [0.15, 0.30]]) / 0.45)


def test_alpha_0_hands_back_the_very_tensors() -> None:
    before = routed(alpha=0.0, unit=1.0)
    (served,) = serve([before], at_hand={2, 3, 4}, normalised=True)
    assert served.index_TK is before.index_TK
    assert served.weight_TK is before.weight_TK
    assert served.num_substituted == 0


def test_lanes_of_a_step_are_one_batch_and_what_was_given_stays_as_it_was() -> None:
    """The lane without substitution brings expert 1, so the other keeps it as well."""
    both = [routed(alpha=0.3, unit=1.0), routed(alpha=0.0, unit=1.0)]
    served = serve(both, at_hand={3}, normalised=False)
    assert [one.num_substituted for one in served] == [0, 0]
    alone = routed(alpha=0.3, unit=1.0)
    (replaced,) = serve([alone], at_hand={3}, normalised=False)
    assert replaced.num_substituted == 2
    assert alone.index_TK.tolist() == [[0, 1], [1, 0]]
