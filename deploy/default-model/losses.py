"""Cross-entropy against soft targets, without ever holding a whole batch's logits.

Knows that the output matrix is frozen, so only the gradient with respect to the last hidden states is wanted; it is
computed together with the loss, a few tokens at a time. Does not know what the targets mean.

Dimensions: T tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CHUNK_TOKENS = 256


def soft_target_loss(
    hidden_TH: Tensor, output_VH: Tensor, teacher_TH: Tensor, next_T: Tensor, share_T: Tensor, weight_T: Tensor
) -> tuple[Tensor, Tensor]:
    """Weighted mean over tokens of -sum target*log p, target = (1-share) one-hot + share * teacher's distribution.

    Returns a value whose gradient is right (it shows the next-token part of the loss), and the next-token losses.
    """
    out: tuple[Tensor, Tensor] = _SoftTargetLoss.apply(  # type: ignore[no-untyped-call]
        hidden_TH, output_VH, teacher_TH, next_T, share_T, weight_T
    )
    return out


class _SoftTargetLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, output_VH: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        teacher_TH, next_T, share_T, weight_T = rest
        grad_TH = torch.empty_like(hidden_TH)
        nll_T = torch.empty(len(hidden_TH))
        weight_T = weight_T / weight_T.sum()
        for start in range(0, len(hidden_TH), _CHUNK_TOKENS):
            part = slice(start, start + _CHUNK_TOKENS)
            p_TV = (hidden_TH[part] @ output_VH.T).softmax(dim=-1)
            rows_T = torch.arange(len(p_TV))
            nll_T[part] = -p_TV[rows_T, next_T[part]].float().clamp_min(1e-9).log()
            share_part_T = share_T[part]
            taught_T = share_part_T.nonzero()[:, 0]
            # p - target is the gradient with respect to the logits.
            p_TV[rows_T, next_T[part]] -= (1 - share_part_T).to(p_TV.dtype)
            if len(taught_T):
                q_TV = (teacher_TH[part][taught_T] @ output_VH.T).softmax(dim=-1)
                p_TV.index_add_(0, taught_T, q_TV.mul_(-share_part_T[taught_T, None].to(p_TV.dtype)))
            p_TV *= weight_T[part, None].to(p_TV.dtype)
            grad_TH[part] = p_TV @ output_VH
        ctx.save_for_backward(grad_TH)
        ctx.mark_non_differentiable(nll_T)
        return (nll_T * weight_T).sum(), nll_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_TH,) = ctx.saved_tensors
        return grad_TH * grads[0].to(grad_TH.dtype), None, None, None, None, None
