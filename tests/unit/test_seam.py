"""Around the single expert: grouping and summing equal the eager loop's, and the handler sees what it should."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from odmoe_model import seam
from support.tiny import tiny_model


@given(st.data())
def test_groups_equal_the_eager_loop(data: st.DataObject):
    num_experts = data.draw(st.integers(1, 6))
    top_k = data.draw(st.integers(1, num_experts))
    rows = data.draw(st.lists(st.permutations(range(num_experts)), max_size=8))
    index_TK = torch.tensor([row[:top_k] for row in rows], dtype=torch.long).reshape(len(rows), top_k)

    mask_EKT = torch.nn.functional.one_hot(index_TK, num_classes=num_experts).permute(2, 1, 0)
    expected = {}
    for expert in mask_EKT.sum(dim=(-1, -2)).nonzero().flatten().tolist():
        place_N, token_N = torch.where(mask_EKT[expert])
        expected[expert] = (token_N.tolist(), place_N.tolist())

    groups = seam.group_rows(index_TK)
    assert list(groups) == sorted(groups)
    assert {e: (tokens.tolist(), places.tolist()) for e, (tokens, places) in groups.items()} == expected


def test_sum_is_in_ascending_order_of_experts_whatever_order_outputs_came_in():
    # 1 + 1e8 - 1e8 in fp32 is 0 in this order and 1 in another.
    outputs = {2: torch.tensor([[-1e8]]), 1: torch.tensor([[1e8]]), 0: torch.tensor([[1.0]])}
    groups = seam.group_rows(torch.tensor([[2, 0, 1]]))
    total = seam.combine(torch.zeros(1, 1), torch.ones(1, 3), groups, outputs)
    assert total.tolist() == [[0.0]]


def test_sum_weighs_in_the_wider_dtype_and_rounds_each_addend():
    x_TH = torch.zeros(1, 1, dtype=torch.bfloat16)
    weight_TK = torch.tensor([[1 / 3, 2 / 3]])
    outputs = {0: torch.full((1, 1), 3.0, dtype=torch.bfloat16), 1: torch.full((1, 1), 1.5, dtype=torch.bfloat16)}
    total = seam.combine(x_TH, weight_TK, seam.group_rows(torch.tensor([[0, 1]])), outputs)
    assert total.dtype == torch.bfloat16
    assert total.item() == 2.0


def test_handler_is_called_once_a_moe_layer_in_order():
    model = tiny_model("deepseek_v2")
    calls: list[seam.ExpertsCall] = []

    def handle(call: seam.ExpertsCall) -> torch.Tensor:
        calls.append(call)
        return torch.zeros_like(call.x_TH)

    assert seam.install(model, handle) == 2, "the first of three layers is dense"
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3, 4]]))
    assert [call.layer for call in calls] == [0, 1]
    assert all(call.x_TH.shape == (4, 64) and call.index_TK.shape == call.weight_TK.shape == (4, 2) for call in calls)


def test_two_models_keep_their_own_handlers():
    seen: list[str] = []
    models = {name: tiny_model("mixtral", num_hidden_layers=1) for name in ("full", "shadow")}
    for name, model in models.items():
        seam.install(model, lambda call, name=name: seen.append(name) or torch.zeros_like(call.x_TH))
    with torch.no_grad():
        for name in ("shadow", "full", "full"):
            models[name](torch.tensor([[1]]))
    assert seen == ["shadow", "full", "full"]
