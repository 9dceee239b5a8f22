"""How evenly tokens are spread over experts and devices: DeepSeek-V2's balance losses, the gauges, token dropping.

The losses (DeepSeek-V2, 2.2.3) train a gate; the same sums over a serving window are gauges.
A device is an expert group: `num_groups` of them share the experts evenly, in order.
Token dropping (DeepSeek-V2, 2.2.4) bounds the rows of a device by what an even split would give it.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class BalanceFactors(NamedTuple):
    """Sums that are 1 at perfect balance, and differentiable in the scores; each a float32 scalar."""

    expert: Tensor  # equation 23 without its alpha
    device: Tensor  # equation 26
    communication: Tensor  # equation 29


@dataclass(frozen=True, slots=True, kw_only=True)
class BalanceWeights:
    """The alphas of the three losses; the defaults are the paper's (DeepSeek-V2, 3.1.2)."""

    expert: float = 0.003
    device: float = 0.05
    communication: float = 0.02

    def loss(self, factors: BalanceFactors) -> Tensor:
        """The sum of the three losses, a scalar."""
        return self.expert * factors.expert + self.device * factors.device + self.communication * factors.communication


def balance_factors(scores: Tensor, topk_idx: Tensor, *, num_groups: int, max_groups: int) -> BalanceFactors:
    """The three sums over a batch or a window of tokens.

    scores: [num_tokens, num_experts] affinities that sum to 1 over the experts; gradients flow through these only.
    topk_idx: [num_tokens, top_k] distinct expert ids of each token, any integer dtype.
    num_groups: devices D; max_groups: M, how many of them a token may visit.
    Raises ValueError where the sizes do not fit or there is no token.
    """
    num_tokens, num_experts = scores.shape
    _check(topk_idx, num_tokens=num_tokens, num_experts=num_experts, num_groups=num_groups)
    if not 0 < max_groups <= num_groups:
        raise ValueError(f"{max_groups=} must be between 1 and {num_groups=}")
    top_k = topk_idx.shape[1]
    f = expert_load(topk_idx, num_experts=num_experts) * (num_experts / (top_k * num_tokens))
    p = scores.float().mean(dim=0)
    p_device = p.view(num_groups, -1).sum(dim=1)
    f_device = f.view(num_groups, -1).mean(dim=1)
    visits = group_rows(topk_idx, num_experts=num_experts, num_groups=num_groups)
    f_communication = visits * (num_groups / (max_groups * num_tokens))
    return BalanceFactors((f * p).sum(), (f_device * p_device).sum(), (f_communication * p_device).sum())


def expert_load(topk_idx: Tensor, *, num_experts: int) -> Tensor:
    """[num_experts] float32: how many tokens select each expert."""
    return torch.bincount(topk_idx.reshape(-1), minlength=num_experts).float()


def group_rows(topk_idx: Tensor, *, num_experts: int, num_groups: int) -> Tensor:
    """[num_groups] float32: how many tokens visit each device, which is the rows that it is sent."""
    return _visits(topk_idx, num_experts=num_experts, num_groups=num_groups).sum(dim=0).float()


def balancedness(load: Tensor) -> Tensor:
    """Mean over maximum of the last dimension: 1 is perfect, 1/n is everything in one place; 1 where nothing is.

    load: [..., n], any dtype, not negative.
    """
    load = load.float()
    largest = load.max(dim=-1).values
    return torch.where(largest > 0, load.mean(dim=-1) / largest.clamp_min(1e-30), torch.ones_like(largest))


def kept_pairs(
    topk_idx: Tensor,
    affinity: Tensor,
    *,
    num_experts: int,
    num_groups: int,
    capacity_factor: float,
    exempt: Tensor | None = None,
) -> Tensor:
    """[num_tokens, top_k] bool: False where token dropping takes the token's row on that expert's device away.

    topk_idx: [num_tokens, top_k] distinct expert ids; affinity: [num_tokens, top_k] float, aligned with it.
    exempt: [num_tokens] bool, tokens that are never dropped (in training, those of about a tenth of the sequences).

    The budget of a device is capacity_factor times the mean number of rows per device, rounded up.
    Beyond it the rows with the lowest affinity go, a row's affinity being the sum over its experts on the device;
    of equal ones the later token goes first. Exempt rows use up budget, and stay even where they exceed it.
    """
    num_tokens = topk_idx.shape[0]
    _check(topk_idx, num_tokens=num_tokens, num_experts=num_experts, num_groups=num_groups)
    if not capacity_factor > 0:
        raise ValueError(f"{capacity_factor=} must be above 0")
    group_idx = topk_idx.long() // (num_experts // num_groups)
    visits = _visits(topk_idx, num_experts=num_experts, num_groups=num_groups)
    row_affinity = torch.zeros(visits.shape, device=visits.device).scatter_add_(1, group_idx, affinity.float())
    row_affinity.masked_fill_(~visits, -torch.inf)
    if exempt is not None:
        row_affinity.masked_fill_(visits & exempt.unsqueeze(1), torch.inf)
    budget = math.ceil(capacity_factor * int(visits.sum()) / num_groups)
    order = row_affinity.sort(dim=0, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(
        0, order, torch.arange(num_tokens, device=order.device).unsqueeze(1).expand_as(order).contiguous()
    )
    kept = rank < budget
    if exempt is not None:
        kept |= exempt.unsqueeze(1)
    return kept.gather(1, group_idx)


def _visits(topk_idx: Tensor, *, num_experts: int, num_groups: int) -> Tensor:
    """[num_tokens, num_groups] bool: which devices each token is sent to."""
    visits = torch.zeros(topk_idx.shape[0], num_groups, dtype=torch.bool, device=topk_idx.device)
    return visits.scatter_(1, topk_idx.long() // (num_experts // num_groups), True)


def _check(topk_idx: Tensor, *, num_tokens: int, num_experts: int, num_groups: int) -> None:
    if num_tokens == 0 or topk_idx.shape[0] != num_tokens:
        raise ValueError(f"{tuple(topk_idx.shape)=} must have a row for each of {num_tokens=}, at least one")
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(f"{num_experts=} must be a multiple of {num_groups=}")
