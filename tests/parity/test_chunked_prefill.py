"""A prompt in chunks: logits are to the bit those of transformers' chunked prefill, tokens those of its plain one.

Every supported family, whatever its cache is made of, over a whole cluster in virtual time.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from odmoe_model.family import SUPPORTED_FAMILIES
from odmoe_model.store import ExpertStore
from odmoe_server.engine.build import EngineOptions
from odmoe_wire.messages import Compute
from support.loopback_cluster import LoopbackCluster
from support.reference import reference_tokens
from support.stores import tiny_store

PROMPT = [(7 * i * i + 3 * i + 5) % 127 + 1 for i in range(45)]
CHUNK = 16
NUM_TOKENS = 8


def ready_cluster(store: ExpertStore, *, chunk: int) -> LoopbackCluster:
    cluster = LoopbackCluster(store, options=EngineOptions(endpoint="inproc://unused", prefill_chunk=chunk))
    for peer_id in ("a", "b"):
        cluster.add_node(peer_id)
    cluster.await_members("a", "b")
    return cluster


def computes(cluster: LoopbackCluster) -> list[Compute]:
    return [sent.message for sent in cluster.network.story if isinstance(sent.message, Compute)]


def prompt_lengths(cluster: LoopbackCluster) -> list[int]:
    """How many tokens each step of the prompt took."""
    spans = [compute.spans[0] for compute in computes(cluster)]
    return list({span.position: span.length for span in spans if span.position < len(PROMPT)}.values())


def chunked_reference(checkpoint: Path) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens of `generate` with chunks, and the logits_V behind the prompt."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.set_experts_implementation("eager")
    ids_BT = torch.tensor([PROMPT])
    out = model.generate(
        ids_BT,
        attention_mask=torch.ones_like(ids_BT),
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        prefill_chunk_size=CHUNK,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences[0, len(PROMPT) :].tolist(), out.logits[0][0]


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_chunks_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    cluster = ready_cluster(ExpertStore.open(tiny_store(family, tmp_path), verify=False), chunk=CHUNK)
    logits: list[torch.Tensor] = []
    tokens, _ = cluster.generate(PROMPT, max_tokens=NUM_TOKENS, on_logits=logits.append)
    expected, first_V = chunked_reference(tmp_path / "checkpoint")
    assert tokens == expected == reference_tokens(tmp_path / "checkpoint", PROMPT, NUM_TOKENS)
    assert torch.equal(logits[0], first_V)
    assert prompt_lengths(cluster) == [16, 16, 13]
    assert max(count for compute in computes(cluster) for count in compute.counts) <= CHUNK
    cluster.assert_nothing_held()


def test_a_model_whose_embedding_depends_on_the_length_gets_its_prompt_in_one_piece(tmp_path: Path) -> None:
    factors = {"long_factor": [4.0] * 8, "short_factor": [1.0] * 8}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors, "original_max_position_embeddings": 24}
    directory = tiny_store("phimoe", tmp_path, rope_parameters={**rope, "short_mscale": 1.1, "long_mscale": 1.2})
    cluster = ready_cluster(ExpertStore.open(directory, verify=False), chunk=CHUNK)
    tokens, _ = cluster.generate(PROMPT, max_tokens=NUM_TOKENS)
    assert tokens == reference_tokens(tmp_path / "checkpoint", PROMPT, NUM_TOKENS)
    assert prompt_lengths(cluster) == [len(PROMPT)]
