"""Routers in closed form: balanced k-means over what the feed-forward networks of the dense model see.

Knows clustering. Does not know the trained deltas: routers are fixed before training and stay as they are.

Dimensions: T tokens, H hidden, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from upcycled import NUM_EXPERTS, UpcycledMlp

_ROUNDS = 40
_SINKHORN_ROUNDS = 20
_TEMPERATURE = 0.05


def collect_inputs(mlps: list[UpcycledMlp], run: object) -> list[Tensor]:
    """Each layer's inputs while `run` drives the dense model over some text."""
    inputs: list[list[Tensor]] = [[] for _ in mlps]
    handles = [
        mlp.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0].flatten(0, -2).float()))
        for mlp, kept in zip(mlps, inputs, strict=True)
    ]
    run()  # type: ignore[operator]
    for handle in handles:
        handle.remove()
    return [torch.cat(kept) for kept in inputs]


def router_rows(x_TH: Tensor, *, seed: int) -> Tensor:
    """One layer's router: cluster centres, scaled so that the two chosen logits differ by 1 on average."""
    # Mixtral's router has no bias. Without its mean direction, which all tokens share, no expert is favoured by it.
    mean_H = functional.normalize(x_TH.mean(dim=0), dim=0)
    flat_TH = x_TH - (x_TH @ mean_H)[:, None] * mean_H
    centres_EH = _balanced_kmeans(functional.normalize(flat_TH, dim=1), seed=seed)
    top_TK = (x_TH @ centres_EH.T).topk(2, dim=1).values
    return centres_EH / (top_TK[:, 0] - top_TK[:, 1]).mean()


def usage_entropy(x_TH: Tensor, router_EH: Tensor) -> float:
    """Entropy of expert usage as a fraction of the maximum: 1 is perfect balance."""
    chosen_TK = (x_TH @ router_EH.T).topk(2, dim=1).indices
    share_E = torch.bincount(chosen_TK.flatten(), minlength=NUM_EXPERTS) / chosen_TK.numel()
    entropy = -(share_E * share_E.clamp_min(1e-9).log()).sum() / torch.tensor(float(NUM_EXPERTS)).log()
    return float(entropy)


def _balanced_kmeans(unit_TH: Tensor, *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres_EH = unit_TH[torch.randperm(len(unit_TH), generator=generator)[:NUM_EXPERTS]]
    for _ in range(_ROUNDS):
        share_TE = _balanced_shares(unit_TH @ centres_EH.T)
        nearest_T = share_TE.argmax(dim=1)
        members_TE = functional.one_hot(nearest_T, NUM_EXPERTS).float()
        centres_EH = functional.normalize(members_TE.T @ unit_TH, dim=1)
    return centres_EH


def _balanced_shares(similarity_TE: Tensor) -> Tensor:
    """Sinkhorn: soft assignments in which every expert receives the same total."""
    share_TE = ((similarity_TE - similarity_TE.max()) / _TEMPERATURE).exp()
    for _ in range(_SINKHORN_ROUNDS):
        share_TE = share_TE / share_TE.sum(dim=0, keepdim=True).clamp_min(1e-12)
        share_TE = share_TE / share_TE.sum(dim=1, keepdim=True).clamp_min(1e-12)
    return share_TE
