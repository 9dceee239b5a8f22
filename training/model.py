"""The nano model for training: transformers' DeepSeek-V2, its routed layers with balance losses and token dropping."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Experts, DeepseekV2Moe

from deploy.checkpoint_presets import PRESETS
from router.balance import BalanceFactors, balance_factors, kept_pairs

# The structure of the random checkpoint of the same name, a little larger.
NANO: Mapping[str, object] = {
    **PRESETS["nano"].fields,
    "vocab_size": 4096,
    "intermediate_size": 768,
    "moe_intermediate_size": 96,
    "num_hidden_layers": 6,
}


@dataclass(slots=True, kw_only=True)
class Routed:
    """What the routed layers of one forward pass share; set it before the pass, read it after."""

    capacity_factor: float | None = None  # None drops nothing
    exempt: Tensor | None = None  # [num_tokens] bool, tokens that are never dropped
    max_groups: int | None = None  # devices a token may visit; None is the config's topk_group
    factors: list[BalanceFactors] = field(default_factory=list)  # by layer, in order
    topk_idx: list[Tensor] = field(default_factory=list)  # by layer: [num_tokens, top_k]
    dropped: list[Tensor] = field(default_factory=list)  # by layer: share of the rows that were dropped

    def clear(self) -> None:
        """Forgets the last pass, keeps the settings."""
        self.factors.clear()
        self.topk_idx.clear()
        self.dropped.clear()


class BalancedMoe(nn.Module):
    """A DeepseekV2Moe, sharing its parameters, that reports its balance and may drop tokens."""

    def __init__(self, moe: DeepseekV2Moe, routed: Routed) -> None:
        super().__init__()
        self.gate, self.experts, self.shared_experts = moe.gate, moe.experts, moe.shared_experts
        self._num_experts, self._top_k = _int(moe.config, "n_routed_experts"), _int(moe.config, "num_experts_per_tok")
        self._num_groups, self._topk_group = _int(moe.config, "n_group"), _int(moe.config, "topk_group")
        self._scale = moe.config.routed_scaling_factor
        self._routed = routed

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states: [batch, length, hidden_size], any float dtype; the same shape comes back."""
        routed = self._routed
        x = hidden_states.view(-1, hidden_states.shape[-1])
        with torch.autocast(x.device.type, enabled=False):  # the gate is in float32 whatever the rest is in
            scores = functional.linear(x.float(), self.gate.weight.float()).softmax(dim=-1)
        topk_idx = self._choose(scores.detach())
        weights = scores.gather(1, topk_idx)
        routed.factors.append(
            balance_factors(scores, topk_idx, num_groups=self._num_groups, max_groups=self._topk_group)
        )
        routed.topk_idx.append(topk_idx)
        if routed.capacity_factor is not None:
            kept = kept_pairs(
                topk_idx,
                weights.detach(),
                num_experts=self._num_experts,
                num_groups=self._num_groups,
                capacity_factor=routed.capacity_factor,
                exempt=routed.exempt,
            )
            routed.dropped.append(1 - kept.float().mean())
            weights = weights * kept
        y = experts_sum(self.experts, x, topk_idx, weights * self._scale)
        return y.view_as(hidden_states) + self.shared_experts(hidden_states)

    def _choose(self, scores: Tensor) -> Tensor:
        """[num_tokens, top_k] int64, ascending: device-limited routing (DeepSeek-V2, 2.2.2).

        Fewer than top_k where `max_groups` devices have fewer experts.
        """
        max_groups = self._routed.max_groups or self._topk_group
        by_group = scores.view(len(scores), self._num_groups, -1)
        top_k = min(self._top_k, max_groups * by_group.shape[-1])
        best = by_group.max(dim=-1).values.topk(max_groups, dim=-1).indices
        closed = torch.ones(by_group.shape[:2], dtype=torch.bool, device=scores.device).scatter_(1, best, False)
        open_scores = by_group.masked_fill(closed.unsqueeze(-1), -1.0).view_as(scores)
        return open_scores.topk(top_k, dim=-1).indices.sort(dim=-1).values


def experts_sum(experts: DeepseekV2Experts, x: Tensor, topk_idx: Tensor, weights: Tensor) -> Tensor:
    """[num_tokens, hidden_size]: each token's experts, weighted and summed.

    One matrix product an expert over the tokens that chose it, which are gathered once for all experts.
    """
    # Taken apart once: a slice an expert would cost a gradient of the whole tensor for each of them.
    into = cast("Tensor", experts.gate_up_proj).unbind()
    out_of = cast("Tensor", experts.down_proj).unbind()
    order = topk_idx.reshape(-1).argsort(stable=True)
    token = order // topk_idx.shape[1]
    counts = torch.bincount(topk_idx.reshape(-1), minlength=len(into)).tolist()
    outputs = []
    for expert, rows in enumerate(x.index_select(0, token).split(counts)):
        gate, up = functional.linear(rows, into[expert]).chunk(2, dim=-1)
        outputs.append(functional.linear(functional.silu(gate) * up, out_of[expert]))
    y = torch.cat(outputs) * weights.reshape(-1).index_select(0, order).unsqueeze(1).to(x.dtype)
    return torch.zeros_like(x).index_add_(0, token, y)


def config_of(fields: Mapping[str, object]) -> DeepseekV2Config:
    return DeepseekV2Config(**cast("dict[str, Any]", fields))


def build(fields: Mapping[str, object] = NANO, *, seed: int) -> tuple[DeepseekV2ForCausalLM, Routed]:
    """A fresh model in float32 and the handle to its routed layers; the same seed gives the same numbers."""
    torch.manual_seed(seed)
    model = DeepseekV2ForCausalLM(config_of(fields))
    return model, instrument(model)


def instrument(model: DeepseekV2ForCausalLM) -> Routed:
    """Puts BalancedMoe in the place of every routed layer; parameter names stay what they were."""
    routed = Routed()
    for layer in model.model.layers:
        if isinstance(layer.mlp, DeepseekV2Moe):
            layer.mlp = BalancedMoe(layer.mlp, routed)
    return routed


def _int(config: DeepseekV2Config, name: str) -> int:
    value = getattr(config, name)
    assert isinstance(value, int)
    return value
