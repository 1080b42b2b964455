"""Single tokens of several sequences share a forward of the model, or come between a prompt's layers: same bits."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from odmoe_model.kvcache import new_cache
from odmoe_model.seam import ExpertsCall, install
from odmoe_model.skeleton import load_skeleton
from odmoe_model.store import ExpertStore
from odmoe_server.engine.build import EngineOptions
from odmoe_server.moe import rows as rows_module
from odmoe_server.moe.lanes import Lane, meet, run_lanes
from odmoe_server.moe.rows import Rows
from support.loopback_cluster import LoopbackCluster
from support.stores import tiny_store

# Those whose attention goes through transformers' own functions and whose tiny models have no windows.
SHARING = ("ernie4_5_moe", "glm4_moe", "granitemoe", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe")
# Latent attention, which looks at its keys; attention of its own; a convolution; windows.
APART = ("deepseek_v2", "deepseek_v3", "gpt_oss", "lfm2_moe", "mixtral")
# Prompts, and how many tokens each goes on with in a step.
SEQUENCES = ((range(3, 40), 2), (range(5, 8), 4), (range(60, 71), 1), (range(1, 90), 5), (range(9, 19), 1))


def model_of(family: str, folder: Path, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.set_num_threads(1)
    model = load_skeleton(ExpertStore.open(tiny_store(family, folder), verify=False), device="cpu").to(dtype)
    install(model, meet)
    return model


def stand_in(lanes: Sequence[Lane], calls: Sequence[ExpertsCall]) -> list[Tensor]:
    """Experts that depend on the row, on the choice and on its weights."""
    return [
        (call.x_TH.sin() * (call.weight_TK * (1 + call.index_TK)).sum(-1, keepdim=True)).to(call.x_TH.dtype)
        for call in calls
    ]


def begun(model: PreTrainedModel) -> list[tuple[int, int, Lane]]:
    """A lane for each sequence's prompt, which it has taken; with how many tokens a step of it has."""
    found = []
    for number, (prompt, width) in enumerate(SEQUENCES):
        ids = [token % 120 for token in prompt]
        lane = Lane(sequence=number, position=0, ids=ids, cache=new_cache(model.config), is_prompt=True)
        run_lanes(model, [lane], stand_in)
        found.append((len(ids), width, lane))
    return found


def lanes_of(begun: Sequence[tuple[int, int, Lane]], *, step: int) -> list[Lane]:
    return [
        Lane(
            sequence=lane.sequence,
            position=length + step * width + place,
            ids=[(step + 7 * place + 1) % 120],
            cache=lane.cache,
        )
        for length, width, lane in begun
        for place in range(width)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", SHARING)
def test_a_row_has_the_bits_of_a_lane(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = model_of(family, tmp_path, dtype=dtype)
    rows = Rows.tried(model, lambda: new_cache(model.config))
    assert rows is not None
    alone, together = begun(model), begun(model)
    for step in range(3):
        expected = run_lanes(model, lanes_of(alone, step=step), stand_in)
        lanes = lanes_of(together, step=step)
        assert rows.fits(lanes)
        assert not rows.fits(lanes[:1])
        found = rows.run(lanes, stand_in)
        assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", APART)
def test_other_families_go_lane_by_lane(family: str, tmp_path: Path) -> None:
    model = model_of(family, tmp_path)
    assert Rows.tried(model, lambda: new_cache(model.config)) is None
    assert model.config._attn_implementation in ("sdpa", "eager")


def test_rows_are_given_up_where_a_forward_of_several_rounds_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of("qwen3_moe", tmp_path)
    monkeypatch.setattr(rows_module, "linear", object())  # nobody takes the products apart
    weight_MK = model.get_output_embeddings().weight
    x_RK = torch.randn(6, weight_MK.shape[1], generator=torch.Generator().manual_seed(1))
    alone_RM = torch.cat([torch.nn.functional.linear(x_1K, weight_MK) for x_1K in torch.split(x_RK, 1)])
    if torch.equal(torch.nn.functional.linear(x_RK, weight_MK), alone_RM):
        pytest.skip("on this machine a product of several rows does not round otherwise")
    assert Rows.tried(model, lambda: new_cache(model.config)) is None


def test_a_failure_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = model_of("qwen3_moe", tmp_path)
    rows = Rows(model)

    def broken(lanes: Sequence[Lane], calls: Sequence[ExpertsCall]) -> list[Tensor]:
        raise RuntimeError("no node")

    with pytest.raises(RuntimeError, match="no node"):
        rows.run(lanes_of(begun(model), step=0), broken)
    assert model.config._attn_implementation == "sdpa"
    expected = run_lanes(model, lanes_of(begun(model), step=0), stand_in)
    found = rows.run(lanes_of(begun(model), step=0), stand_in)
    assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))


@pytest.mark.parametrize("family", ["qwen3_moe", "lfm2_moe", "gpt_oss"])
def test_answers_between_a_prompts_layers_change_neither(family: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    store = ExpertStore.open(tiny_store(family, tmp_path), verify=False)
    cluster = LoopbackCluster(store, options=EngineOptions(endpoint="inproc://unused", prefill_chunk=32))
    for peer_id in ("n0", "n1"):
        cluster.add_node(peer_id, slots=2)
    cluster.await_members("n0", "n1")
    prompts = ([3, 5, 7, 11], [9, 2], [(7 * i * i + 2) % 120 + 1 for i in range(50)])
    alone = [cluster.generate_together([prompt], max_tokens=9) for prompt in prompts]
    tokens, logits = cluster.generate_together(prompts, max_tokens=9, by_layer=True)
    assert tokens == [told[0] for told, _ in alone]
    for (_, (expected,)), found in zip(alone, logits, strict=True):
        assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))
    cluster.assert_nothing_held()
