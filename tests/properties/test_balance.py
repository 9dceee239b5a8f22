"""The balance losses and token dropping against what the paper's formulas say, written out in loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from router.balance import (
    BalanceWeights,
    balance_factors,
    balancedness,
    expert_load,
    group_rows,
    kept_pairs,
)

CHECKED = settings(deadline=None, derandomize=True, max_examples=100)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """(scores [T, N], topk_idx [T, K], D); the scores have ties now and then."""
    num_groups = draw(st.sampled_from([1, 2, 4]))
    num_experts = num_groups * draw(st.integers(1, 4))
    num_tokens, top_k = draw(st.integers(1, 12)), draw(st.integers(1, num_experts))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = torch.randn(num_tokens, num_experts, generator=generator)
    if draw(st.booleans()):
        logits = logits.round()
    scores = logits.softmax(dim=-1)
    topk_idx = torch.rand(num_tokens, num_experts, generator=generator).topk(top_k).indices.sort(dim=-1).values
    return scores, topk_idx, num_groups


@CHECKED
@given(batches())
def test_the_three_sums_are_those_of_the_paper(batch: tuple[Tensor, Tensor, int]) -> None:
    scores, topk_idx, num_groups = batch
    for max_groups in range(1, num_groups + 1):
        factors = balance_factors(scores, topk_idx, num_groups=num_groups, max_groups=max_groups)
        expected = _factors_twin(scores, topk_idx, num_groups, max_groups)
        assert [f.item() for f in factors] == pytest.approx(expected, rel=1e-5)


@CHECKED
@given(batches())
def test_the_gauges_count_tokens(batch: tuple[Tensor, Tensor, int]) -> None:
    scores, topk_idx, num_groups = batch
    num_experts = scores.shape[1]
    per_group = num_experts // num_groups
    chosen = topk_idx.tolist()
    load = [sum(expert in row for row in chosen) for expert in range(num_experts)]
    rows = [sum(any(e // per_group == g for e in row) for row in chosen) for g in range(num_groups)]
    assert expert_load(topk_idx, num_experts=num_experts).tolist() == load
    assert group_rows(topk_idx, num_experts=num_experts, num_groups=num_groups).tolist() == rows
    assert balancedness(torch.tensor(load)).item() == pytest.approx(sum(load) / len(load) / max(load))


@pytest.mark.parametrize(
    ("num_experts", "num_groups", "top_k", "max_groups"), [(8, 4, 2, 2), (32, 8, 6, 3), (6, 1, 3, 1)]
)
def test_every_loss_is_its_alpha_at_perfect_balance(
    num_experts: int, num_groups: int, top_k: int, max_groups: int
) -> None:
    topk_idx = _even_choice(num_experts, num_groups, top_k, max_groups)
    scores = torch.full((len(topk_idx), num_experts), 1 / num_experts)
    factors = balance_factors(scores, topk_idx, num_groups=num_groups, max_groups=max_groups)
    assert [f.item() for f in factors] == pytest.approx([1.0, 1.0, 1.0])
    weights = BalanceWeights()
    assert weights.loss(factors).item() == pytest.approx(weights.expert + weights.device + weights.communication)
    assert balancedness(expert_load(topk_idx, num_experts=num_experts)).item() == 1.0


def test_gradients_of_the_losses_check_numerically() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(10, 8, generator=generator)
    topk_idx = logits.topk(3).indices

    def loss(values: Tensor) -> Tensor:
        return BalanceWeights(expert=1, device=1, communication=1).loss(
            balance_factors(values.softmax(dim=-1), topk_idx, num_groups=4, max_groups=2)
        )

    values = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(values), values)
    for index in [(0, 0), (3, 5), (9, 7)]:
        step = torch.zeros_like(logits)
        step[index] = 1e-2
        numeric = (loss(logits + step) - loss(logits - step)).item() / 2e-2
        assert gradient[index].item() == pytest.approx(numeric, rel=2e-2, abs=2e-5)


def test_a_step_against_the_gradient_makes_the_crowded_expert_less_likely() -> None:
    logits = torch.zeros(64, 8)
    logits[:, 0] = 2.0
    logits.requires_grad_()
    scores = logits.softmax(dim=-1)
    factors = balance_factors(scores, scores.topk(2).indices, num_groups=4, max_groups=2)
    (gradient,) = torch.autograd.grad(BalanceWeights().loss(factors), logits)
    assert (gradient[:, 0] > 0).all()


@CHECKED
@given(batches(), st.floats(0.05, 3.0), st.data())
def test_dropping_is_what_the_plain_twin_says(
    batch: tuple[Tensor, Tensor, int], factor: float, data: st.DataObject
) -> None:
    scores, topk_idx, num_groups = batch
    num_tokens, num_experts = scores.shape
    exempt = torch.tensor(data.draw(st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens)))
    affinity = scores.gather(1, topk_idx)
    kept = kept_pairs(
        topk_idx, affinity, num_experts=num_experts, num_groups=num_groups, capacity_factor=factor, exempt=exempt
    )
    assert kept.tolist() == _kept_twin(topk_idx, affinity, num_experts, num_groups, factor, exempt.tolist())


@CHECKED
@given(batches(), st.floats(0.05, 3.0), st.data())
def test_dropping_keeps_the_budget_and_never_touches_exempt_rows(
    batch: tuple[Tensor, Tensor, int], factor: float, data: st.DataObject
) -> None:
    scores, topk_idx, num_groups = batch
    num_tokens, num_experts = scores.shape
    exempt = torch.tensor(data.draw(st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens)))
    kept = kept_pairs(
        topk_idx,
        scores.gather(1, topk_idx),
        num_experts=num_experts,
        num_groups=num_groups,
        capacity_factor=factor,
        exempt=exempt,
    )
    assert kept[exempt].all()
    rows = group_rows(topk_idx, num_experts=num_experts, num_groups=num_groups)
    budget = math.ceil(factor * int(rows.sum()) / num_groups)
    group_idx = topk_idx // (num_experts // num_groups)
    for group in range(num_groups):
        kept_rows = ((group_idx == group) & kept).any(dim=1)
        assert kept_rows.sum() <= max(budget, int((exempt & (group_idx == group).any(dim=1)).sum()))
        assert kept_rows.sum() >= min(budget, int(rows[group]))


@CHECKED
@given(batches())
def test_room_for_every_row_drops_none(batch: tuple[Tensor, Tensor, int]) -> None:
    scores, topk_idx, num_groups = batch
    kept = kept_pairs(
        topk_idx,
        scores.gather(1, topk_idx),
        num_experts=scores.shape[1],
        num_groups=num_groups,
        capacity_factor=float(num_groups),
    )
    assert kept.all()


def test_sizes_that_do_not_fit_are_refused_with_their_numbers() -> None:
    scores, topk_idx = torch.full((2, 6), 1 / 6), torch.tensor([[0, 1], [2, 3]])
    with pytest.raises(ValueError, match="num_groups=4"):
        balance_factors(scores, topk_idx, num_groups=4, max_groups=1)
    with pytest.raises(ValueError, match="max_groups=3"):
        balance_factors(scores, topk_idx, num_groups=2, max_groups=3)
    with pytest.raises(ValueError, match="num_tokens=0"):
        balance_factors(scores[:0], topk_idx[:0], num_groups=2, max_groups=1)
    with pytest.raises(ValueError, match="capacity_factor=0"):
        kept_pairs(topk_idx, topk_idx.float(), num_experts=6, num_groups=2, capacity_factor=0)


def test_nothing_selected_anywhere_is_balanced() -> None:
    assert balancedness(torch.zeros(2, 4)).tolist() == [1.0, 1.0]


def _factors_twin(scores: Tensor, topk_idx: Tensor, num_groups: int, max_groups: int) -> list[float]:
    """DeepSeek-V2, 2.2.3, equations 23 to 31, without the alphas."""
    (num_tokens, num_experts), top_k = scores.shape, topk_idx.shape[1]
    members = [range(g * num_experts // num_groups, (g + 1) * num_experts // num_groups) for g in range(num_groups)]
    chosen = [set(row) for row in topk_idx.tolist()]
    s = scores.tolist()
    f = [num_experts / (top_k * num_tokens) * sum(i in row for row in chosen) for i in range(num_experts)]
    p = [sum(s[t][i] for t in range(num_tokens)) / num_tokens for i in range(num_experts)]
    f_device = [sum(f[j] for j in group) / len(group) for group in members]
    p_device = [sum(p[j] for j in group) for group in members]
    f_sent = [
        num_groups / (max_groups * num_tokens) * sum(not row.isdisjoint(group) for row in chosen) for group in members
    ]
    return [
        sum(a * b for a, b in zip(f, p)),
        sum(a * b for a, b in zip(f_device, p_device)),
        sum(a * b for a, b in zip(f_sent, p_device)),
    ]


def _kept_twin(
    topk_idx: Tensor, affinity: Tensor, num_experts: int, num_groups: int, factor: float, exempt: list[bool]
) -> list[list[bool]]:
    """Device by device: rows from the highest affinity down, the exempt ones first, until the budget is used up."""
    per_group = num_experts // num_groups
    rows: list[dict[int, float]] = [{} for _ in range(num_groups)]  # by group: token -> affinity, in float32
    for token, experts in enumerate(topk_idx.tolist()):
        for slot, expert in enumerate(experts):
            group = rows[expert // per_group]
            group[token] = float(torch.tensor(group.get(token, 0.0)) + affinity[token, slot])
    budget = math.ceil(factor * sum(map(len, rows)) / num_groups)
    kept = []
    for group in rows:
        ranked = sorted(group, key=lambda token: (not exempt[token], -group[token], token))
        kept.append({token for place, token in enumerate(ranked) if place < budget or exempt[token]})
    return [[token in kept[e // per_group] for e in row] for token, row in enumerate(topk_idx.tolist())]


def _even_choice(num_experts: int, num_groups: int, top_k: int, max_groups: int) -> Tensor:
    """Every token uses `max_groups` devices and `top_k` experts, every device and every expert equally often."""
    per_group, per_visit = num_experts // num_groups, top_k // max_groups
    rows = [
        [((g + d) % num_groups) * per_group + (e + i) % per_group for d in range(max_groups) for i in range(per_visit)]
        for g in range(num_groups)
        for e in range(per_group)
    ]
    return torch.tensor(rows)
