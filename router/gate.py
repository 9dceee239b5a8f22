"""Device-limited routing: which experts each token visits, and with what weight.

This is the plain twin, in torch, and the definition of what is right; router/gate_fast.py computes the same faster.
The reference is vLLM 0.32's CPU router, operation by operation, so that equal logits give equal experts even where
scores tie: which of two tied experts wins is whatever torch.topk says, and torch.topk decides row by row.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from experts.shape import MoEShape


class Routing(NamedTuple):
    """The experts of each token, ascending by id, so that sums over them have one order wherever experts live."""

    topk_idx: Tensor  # [num_tokens, top_k] int32, global expert ids, distinct and ascending within a token
    topk_weights: Tensor  # [num_tokens, top_k] float32, aligned with topk_idx


def route(logits: Tensor, shape: MoEShape, *, bias: Tensor | None = None, scale: float = 1.0) -> Routing:
    """The experts that each token visits, as vLLM would choose them.

    logits: [num_tokens, num_experts], float32, bfloat16 or float16, straight from the gate.
    bias: [num_experts], any float dtype; e_score_correction_bias, given exactly when shape.uses_bias.
    scale: vLLM's layer.routed_scaling_factor (already 1.0 where vLLM scales the layer's output), applied last.

    NaN logits count as -inf. A token whose scores are still undefined (no finite logit, or one that is +inf, under
    softmax) gets valid experts and NaN weights: it must not look like an answer.
    Raises ValueError where logits, bias, scale and shape do not fit together.
    """
    check_arguments(tuple(logits.shape), shape, bias_shape=None if bias is None else tuple(bias.shape), scale=scale)
    logits = logits.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    topk_idx, topk_weights = _by_groups(logits, shape, bias, scale) if shape.grouped else _by_logits(logits, shape)
    # Sorted only now: vLLM adds the weights up in torch.topk's order when it renormalises.
    topk_idx, order = topk_idx.sort(dim=-1)
    return Routing(topk_idx.to(torch.int32), topk_weights.gather(1, order).to(torch.float32))


def check_arguments(
    logits_shape: tuple[int, ...], shape: MoEShape, *, bias_shape: tuple[int, ...] | None, scale: float
) -> None:
    """Refuses, with ValueError, what vLLM's CPU router would refuse, crash on, or quietly ignore."""
    if len(logits_shape) != 2 or logits_shape[1] != shape.num_experts:
        raise ValueError(f"{logits_shape=} must be (num_tokens, {shape.num_experts=})")
    if bias_shape != ((shape.num_experts,) if shape.uses_bias else None):
        raise ValueError(f"{bias_shape=} does not fit {shape.method=} with {shape.num_experts=}")
    if shape.uses_bias and shape.experts_per_model_group < 2:
        raise ValueError(f"{shape.method=} ranks groups by two experts, but {shape.experts_per_model_group=}")
    if not shape.grouped and (shape.scoring != "softmax" or shape.num_model_groups != 1 or shape.uses_bias):
        raise ValueError(f"{shape.grouped=} fits softmax over one group only, not {shape.scoring=}, {shape.method=}")
    if not shape.grouped and scale != 1.0:
        raise ValueError(f"{scale=} with {shape.grouped=}: vLLM ignores the factor on this path")


def _by_groups(logits: Tensor, shape: MoEShape, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """DeepSeek's routing, in float32: the best topk_group groups, then the best top_k experts inside them."""
    logits = logits.float()
    scores = torch.softmax(logits, dim=-1) if shape.scoring == "softmax" else logits.sigmoid()
    choice = scores if bias is None else scores + bias.unsqueeze(0)
    by_group = choice.view(-1, shape.num_model_groups, shape.experts_per_model_group)
    if bias is None:
        # A group is worth its best expert (DeepSeek-V2, 2.2.2), not its sum.
        group_scores = by_group.max(dim=-1).values
    else:
        # With bias, its best two (DeepSeek-V3, 2.1.2).
        group_scores = by_group.topk(2, dim=-1).values.sum(dim=-1)
    best_groups = torch.topk(group_scores, k=shape.topk_group, dim=-1, sorted=False).indices
    closed = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, best_groups, False)
    # -inf and not 0.0: with a negative bias an expert of a closed group would otherwise win.
    choice = by_group.masked_fill(closed.unsqueeze(-1), -torch.inf).view(-1, shape.num_experts)
    topk_idx = torch.topk(choice, k=shape.top_k, dim=-1, sorted=False).indices
    topk_weights = scores.gather(1, topk_idx)
    if shape.norm_topk_prob:
        topk_weights = topk_weights / topk_weights.sum(dim=-1, keepdim=True)
    return topk_idx, topk_weights if scale == 1.0 else topk_weights * scale


def _by_logits(logits: Tensor, shape: MoEShape) -> tuple[Tensor, Tensor]:
    """Plain top-k on the logits; softmax in the logits' own dtype, so bfloat16 logits give bfloat16-rounded weights."""
    topk_logits, topk_idx = torch.topk(logits, k=shape.top_k, dim=-1, sorted=False)
    if shape.norm_topk_prob:
        return topk_idx, torch.softmax(topk_logits, dim=-1)
    return topk_idx, (topk_logits - torch.logsumexp(logits, dim=-1, keepdim=True)).exp()
