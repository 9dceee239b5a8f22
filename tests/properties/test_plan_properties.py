"""What holds of every plan: nothing is lost, nothing is doubled, and no token visits more groups than it may."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_twin import plan_by_groups

from experts.shape import MoEShape, RoutingMethod
from router.gate import route
from router.plan import GroupRows, make_plan

CHECKED = settings(deadline=None, derandomize=True, max_examples=60)


@st.composite
def cases(draw: st.DrawFn) -> tuple[MoEShape, int, torch.Tensor]:
    """A shape with grouped routing, a number of expert groups that fits it, and logits with ties."""
    n_group, per_group = draw(st.sampled_from([(8, 4), (4, 4), (8, 2), (1, 16), (6, 2)]))
    topk_group = draw(st.integers(1, min(3, n_group)))
    noaux = n_group > 1 and draw(st.booleans())
    shape = MoEShape(
        moe_layers=(0,),
        hidden_size=8,
        moe_intermediate_size=8,
        num_experts=n_group * per_group,
        top_k=draw(st.integers(1, min(6, topk_group * per_group))),
        num_model_groups=n_group,
        topk_group=topk_group,
        method=RoutingMethod.NOAUX_TC if noaux else RoutingMethod.GROUP_LIMITED_GREEDY,
        scoring="sigmoid" if noaux else "softmax",
        grouped=True,
    )
    unit = n_group if n_group > 1 else shape.num_experts
    num_groups = draw(st.sampled_from([d for d in range(1, unit + 1) if unit % d == 0]))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    logits = rng.integers(-4, 5, (draw(st.integers(1, 30)), shape.num_experts)).astype(np.float32)
    return shape, num_groups, torch.from_numpy(logits)


def planned(shape: MoEShape, num_groups: int, logits: torch.Tensor) -> tuple[np.ndarray, np.ndarray, list[GroupRows]]:
    bias = torch.zeros(shape.num_experts) if shape.uses_bias else None
    routing = route(logits, shape, bias=bias)
    idx, weights = routing.topk_idx.numpy(), routing.topk_weights.numpy()
    return idx, weights, make_plan(idx, weights, num_experts=shape.num_experts, num_groups=num_groups)


@CHECKED
@given(case=cases())
def test_every_pair_of_token_and_expert_is_in_exactly_one_groups_rows(case: tuple[MoEShape, int, torch.Tensor]) -> None:
    shape, num_groups, logits = case
    idx, weights, plan = planned(shape, num_groups, logits)
    found = sorted(
        (int(rows.tokens[row]), int(expert), int(bits)) for rows in plan for row, expert, bits in rows.pairs.T
    )
    wanted = sorted(
        (token, int(expert), int(bits))
        for token in range(len(idx))
        for expert, bits in zip(idx[token], weights[token].view(np.int32))
    )
    assert found == wanted
    for rows in plan:
        assert set(rows.pairs[1].tolist()) <= set(shape.home_experts(rows.group, num_groups))


@CHECKED
@given(case=cases())
def test_the_compiled_plan_is_its_plain_twins(case: tuple[MoEShape, int, torch.Tensor]) -> None:
    shape, num_groups, _ = case
    idx, weights, plan = planned(*case)
    twin = plan_by_groups(idx, weights, num_experts=shape.num_experts, num_groups=num_groups)
    assert [rows.group for rows in plan] == [rows.group for rows in twin]
    for rows, expected in zip(plan, twin):
        np.testing.assert_array_equal(rows.tokens, expected.tokens)
        np.testing.assert_array_equal(rows.pairs, expected.pairs)


@CHECKED
@given(case=cases())
def test_a_token_is_at_most_one_row_of_a_group_and_rows_ascend(case: tuple[MoEShape, int, torch.Tensor]) -> None:
    _, _, plan = planned(*case)
    assert [rows.group for rows in plan] == sorted({rows.group for rows in plan})
    for rows in plan:
        assert (np.diff(rows.tokens) > 0).all()
        assert sorted(set(rows.pairs[0].tolist())) == list(range(len(rows.tokens)))
        keys = rows.pairs[0].astype(np.int64) * 10_000 + rows.pairs[1]
        assert (np.diff(keys) > 0).all()  # by row and then by expert: one order of additions for every copy


@CHECKED
@given(case=cases())
def test_a_token_visits_at_most_topk_group_model_groups_and_as_many_expert_groups(
    case: tuple[MoEShape, int, torch.Tensor],
) -> None:
    shape, num_groups, logits = case
    idx, _, plan = planned(shape, num_groups, logits)
    if shape.num_model_groups == 1:
        return  # no device limit to keep
    for token in range(len(idx)):
        model_groups = set((idx[token] // shape.experts_per_model_group).tolist())
        expert_groups = [rows.group for rows in plan if token in rows.tokens]
        assert len(model_groups) <= shape.topk_group
        assert len(expert_groups) <= len(model_groups)
