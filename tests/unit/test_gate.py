"""Routing against those we must agree with: vLLM's CPU router, and the others up to differences named here."""

from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from torch import Tensor

from experts.shape import MoEShape, RoutingMethod
from router.gate import Routing, route


def shape_of(
    num_experts: int,
    top_k: int,
    *,
    groups: tuple[int, int] = (1, 1),
    method: RoutingMethod = RoutingMethod.GREEDY,
    scoring: Literal["softmax", "sigmoid"] = "softmax",
    norm: bool = False,
    grouped: bool = True,
) -> MoEShape:
    return MoEShape(
        moe_layers=(1,),
        hidden_size=16,
        moe_intermediate_size=16,
        num_experts=num_experts,
        top_k=top_k,
        num_model_groups=groups[0],
        topk_group=groups[1],
        method=method,
        scoring=scoring,
        norm_topk_prob=norm,
        grouped=grouped,
    )


V2 = shape_of(160, 6, groups=(8, 3), method=RoutingMethod.GROUP_LIMITED_GREEDY)
V2_NORM = shape_of(64, 6, groups=(8, 3), method=RoutingMethod.GROUP_LIMITED_GREEDY, norm=True)
V2_LITE = shape_of(64, 6)
V3 = shape_of(256, 8, groups=(8, 4), method=RoutingMethod.NOAUX_TC, scoring="sigmoid", norm=True)
QWEN3 = shape_of(128, 8, norm=True, grouped=False)
QWEN3_RAW = shape_of(128, 8, grouped=False)
MIXTRAL = shape_of(8, 2, norm=True, grouped=False)
SHAPES = {
    "v2": V2,
    "v2-norm": V2_NORM,
    "v2-lite": V2_LITE,
    "v3": V3,
    "qwen3": QWEN3,
    "qwen3-raw": QWEN3_RAW,
    "mixtral": MIXTRAL,
}
TIED_V2 = shape_of(8, 3, groups=(4, 2), method=RoutingMethod.GROUP_LIMITED_GREEDY)
TIED_V3 = shape_of(8, 3, groups=(4, 2), method=RoutingMethod.NOAUX_TC, scoring="sigmoid", norm=True)


def logits_of(shape: MoEShape, kind: str, *, num_tokens: int = 96, seed: int = 0) -> Tensor:
    """kind: normal, wide (scores from nearly 1 down to 0) or ties (many equal logits in every row)."""
    rng = torch.Generator().manual_seed(seed)
    if kind == "ties":
        return torch.randint(0, 6, (num_tokens, shape.num_experts), generator=rng) / 4
    return torch.randn(num_tokens, shape.num_experts, generator=rng) * (1.0 if kind == "normal" else 40.0)


def bias_of(shape: MoEShape) -> Tensor | None:
    rng = torch.Generator().manual_seed(7)
    return torch.randn(shape.num_experts, generator=rng) * 0.1 if shape.uses_bias else None


def by_id(topk_weights: Tensor, topk_idx: Tensor) -> Routing:
    """Another router's answer in our order."""
    topk_idx, order = topk_idx.to(torch.int32).sort(dim=-1)
    return Routing(topk_idx, topk_weights.gather(1, order).to(torch.float32))


def vllm_route(logits: Tensor, shape: MoEShape, *, bias: Tensor | None = None, scale: float = 1.0) -> Routing:
    cpu_router = pytest.importorskip("vllm.model_executor.layers.fused_moe.router.cpu_router")
    router = cpu_router.CPURouter(
        top_k=shape.top_k,
        global_num_experts=shape.num_experts,
        use_grouped_topk=shape.grouped,
        num_expert_group=shape.num_model_groups,
        topk_group=shape.topk_group,
        renormalize=shape.norm_topk_prob,
        scoring_func=shape.scoring,
        routed_scaling_factor=scale,
        e_score_correction_bias=bias,
    )
    return by_id(*router._compute_routing(torch.zeros(len(logits), shape.hidden_size), logits, torch.int32))


def vllm_gpu_twin(logits: Tensor, shape: MoEShape, *, bias: Tensor | None = None, scale: float = 1.0) -> Routing:
    """The torch code that vLLM runs on GPUs without a fused kernel, not compiled."""
    grouped = pytest.importorskip("vllm.model_executor.layers.fused_moe.router.grouped_topk_router")
    return by_id(
        *grouped.grouped_topk._torchdynamo_orig_callable(
            torch.zeros(len(logits), shape.hidden_size),
            logits,
            shape.top_k,
            shape.norm_topk_prob,
            shape.num_model_groups,
            shape.topk_group,
            shape.scoring,
            scale,
            bias,
        )
    )


def transformers_route(name: str, logits: Tensor, shape: MoEShape, *, bias: Tensor | None = None) -> Routing:
    """A transformers router whose weight is the identity, so that it sees exactly these logits."""
    modeling = pytest.importorskip(f"transformers.models.{name}.modeling_{name}")
    config = SimpleNamespace(
        num_experts_per_tok=shape.top_k,
        num_experts=shape.num_experts,
        num_local_experts=shape.num_experts,
        hidden_size=shape.num_experts,
        routed_scaling_factor=1.0,
        n_group=shape.num_model_groups,
        topk_group=shape.topk_group,
        topk_method=shape.method.value,
        norm_topk_prob=shape.norm_topk_prob,
    )
    routers = {
        "deepseek_v2": "DeepseekV2TopkRouter",
        "deepseek_v3": "DeepseekV3TopkRouter",
        "qwen3_moe": "Qwen3MoeTopKRouter",
        "mixtral": "MixtralTopKRouter",
    }
    router = getattr(modeling, routers[name])(config)
    router.weight.data = torch.eye(shape.num_experts, dtype=logits.dtype)
    if bias is not None:
        router.e_score_correction_bias = bias
    with torch.no_grad():
        _, topk_weights, topk_idx = router(logits)
    return by_id(topk_weights, topk_idx)


def assert_same(ours: Routing, theirs: Routing, *, rtol: float = 0.0) -> None:
    assert torch.equal(ours.topk_idx, theirs.topk_idx)
    torch.testing.assert_close(ours.topk_weights, theirs.topk_weights, rtol=rtol, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["normal", "wide", "ties"])
@pytest.mark.parametrize("name", SHAPES)
def test_route_is_bit_for_bit_what_vllms_cpu_router_says(name: str, kind: str, dtype: torch.dtype) -> None:
    shape = SHAPES[name]
    logits, bias = logits_of(shape, kind).to(dtype), bias_of(shape)
    scale = 2.5 if shape.grouped else 1.0
    assert_same(route(logits, shape, bias=bias, scale=scale), vllm_route(logits, shape, bias=bias, scale=scale))


@pytest.mark.parametrize("kind", ["normal", "ties"])
@pytest.mark.parametrize("name", ["v2", "v2-norm", "v2-lite", "v3"])
def test_route_is_what_vllms_gpu_code_says_of_float32_logits(name: str, kind: str) -> None:
    shape = SHAPES[name]
    logits, bias = logits_of(shape, kind), bias_of(shape)
    assert_same(route(logits, shape, bias=bias, scale=2.5), vllm_gpu_twin(logits, shape, bias=bias, scale=2.5))


@pytest.mark.parametrize(
    ("name", "shape"),
    [("deepseek_v2", V2), ("deepseek_v2", V2_LITE), ("deepseek_v3", V3), ("qwen3_moe", QWEN3), ("mixtral", MIXTRAL)],
)
def test_route_is_what_transformers_says_of_float32_logits_without_ties(name: str, shape: MoEShape) -> None:
    logits, bias = logits_of(shape, "normal"), bias_of(shape)
    # Not bit by bit: transformers divides probabilities where vLLM takes a softmax of the chosen, or adds 1e-20.
    assert_same(route(logits, shape, bias=bias), transformers_route(name, logits, shape, bias=bias), rtol=1e-6)


def test_difference_vllms_gpu_code_takes_bfloat16_scores_and_so_ties_what_we_tell_apart() -> None:
    # Two neighbours in bfloat16: their scores differ in float32, and are one number in bfloat16.
    logits = torch.tensor([[0.251953125, 0.25, 0.0, 0.0]], dtype=torch.bfloat16)
    shape = shape_of(4, 1)
    assert_same(route(logits, shape), vllm_route(logits, shape))
    assert route(logits, shape).topk_idx.tolist() == [[0]]
    theirs = vllm_gpu_twin(logits, shape)
    assert theirs.topk_idx.tolist() == [[1]]
    assert theirs.topk_weights.tolist() == [[0.28125]]
    assert route(logits, shape).topk_weights.item() == pytest.approx(0.28148, abs=1e-5)


def test_difference_transformers_v2_ignores_norm_topk_prob() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    shape = shape_of(4, 2, norm=True)
    assert route(logits, shape).topk_weights.sum().item() == pytest.approx(1.0)
    assert transformers_route("deepseek_v2", logits, shape).topk_weights.sum().item() == pytest.approx(0.8808, abs=1e-4)


def test_difference_transformers_v2_masks_with_zero_and_can_leave_the_chosen_groups() -> None:
    shape = shape_of(4, 2, groups=(2, 1), method=RoutingMethod.GROUP_LIMITED_GREEDY)
    # Group 0 wins, and its second expert's score underflows to 0.0, the value that transformers masks group 1 with.
    logits = torch.tensor([[120.0, -120.0, 10.0, 10.0]])
    assert_same(route(logits, shape), vllm_route(logits, shape))
    assert route(logits, shape).topk_idx.tolist() == [[0, 1]]
    assert transformers_route("deepseek_v2", logits, shape).topk_idx.tolist() == [[0, 2]]


def test_masking_with_minus_infinity_keeps_negative_biased_scores_inside_their_groups() -> None:
    # Scores + bias are all negative: masked with 0.0, as DeepSeek's first code did, closed groups would win.
    bias = torch.tensor([-3.0, -3.0, -2.0, -2.0, -3.0, -3.0, -2.0, -2.0])
    ours = route(torch.zeros(1, 8), TIED_V3, bias=bias)
    assert set(ours.topk_idx.tolist()[0]) <= {2, 3, 6, 7}
    assert_same(ours, vllm_route(torch.zeros(1, 8), TIED_V3, bias=bias))
    assert_same(ours, transformers_route("deepseek_v3", torch.zeros(1, 8), TIED_V3, bias=bias), rtol=1e-6)


def test_difference_transformers_v3_guards_renormalisation_where_vllm_divides_zero_by_zero() -> None:
    logits = torch.full((1, 8), -200.0)
    bias = torch.arange(8.0)
    ours = route(logits, TIED_V3, bias=bias)
    theirs = transformers_route("deepseek_v3", logits, TIED_V3, bias=bias)
    assert_same(ours, vllm_route(logits, TIED_V3, bias=bias))
    assert ours.topk_weights.isnan().all()
    assert theirs.topk_weights.tolist() == [[0.0, 0.0, 0.0]]


def test_difference_transformers_qwen3_and_mixtral_select_by_float32_scores_and_not_by_logits() -> None:
    # Logits apart by less than their scores can tell: a tie for transformers, none for vLLM and us.
    logits = torch.zeros(1, 8)
    logits[0, 5] = 1e-9
    shape = shape_of(8, 1, norm=True, grouped=False)
    assert route(logits, shape).topk_idx.tolist() == [[5]]
    assert_same(route(logits, shape), vllm_route(logits, shape))
    assert transformers_route("mixtral", logits, shape).topk_idx.tolist() != [[5]]
    assert transformers_route("qwen3_moe", logits, shape).topk_idx.tolist() != [[5]]


def test_difference_vllm_rounds_the_weights_of_bfloat16_logits_and_mixtral_in_transformers_does_not() -> None:
    logits = logits_of(MIXTRAL, "normal").to(torch.bfloat16)
    ours, theirs = route(logits, MIXTRAL), transformers_route("mixtral", logits, MIXTRAL)
    assert_same(ours, vllm_route(logits, MIXTRAL))
    assert torch.equal(ours.topk_weights, ours.topk_weights.bfloat16().float())
    assert not torch.equal(theirs.topk_weights, theirs.topk_weights.bfloat16().float())


def test_difference_vllm_scales_what_it_has_normalised_and_ignores_the_factor_without_groups() -> None:
    logits = logits_of(V2_NORM, "normal")
    assert torch.allclose(route(logits, V2_NORM, scale=16.0).topk_weights.sum(-1), torch.tensor(16.0))
    logits = logits_of(MIXTRAL, "normal")
    assert_same(vllm_route(logits, MIXTRAL, scale=16.0), vllm_route(logits, MIXTRAL))
    with pytest.raises(ValueError, match="scale=16.0"):
        route(logits, MIXTRAL, scale=16.0)


def test_the_order_of_vllms_ties_is_not_the_lowest_id_first() -> None:
    # Why neither path has a rule of its own for ties.
    logits = torch.zeros(1, 160)
    assert_same(route(logits, V2), vllm_route(logits, V2))
    assert route(logits, V2).topk_idx.tolist() != [[0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("name", SHAPES)
def test_nan_counts_as_minus_infinity_and_a_row_of_nan_gets_valid_experts(name: str) -> None:
    shape = SHAPES[name]
    logits, bias = logits_of(shape, "normal", num_tokens=3), bias_of(shape)
    logits[0] = torch.nan
    logits[1, ::2] = torch.nan
    routing = route(logits, shape, bias=bias)
    assert_same(routing, route(logits.where(~logits.isnan(), torch.tensor(-torch.inf)), shape, bias=bias))
    for row in routing.topk_idx.tolist():
        assert len(set(row)) == shape.top_k and all(0 <= expert < shape.num_experts for expert in row)
    assert routing.topk_weights[0].isnan().all()
    assert routing.topk_weights[1:].isfinite().all()


def test_no_tokens_give_no_rows() -> None:
    for shape in SHAPES.values():
        assert route(torch.empty(0, shape.num_experts), shape, bias=bias_of(shape)).topk_idx.shape == (0, shape.top_k)


@pytest.mark.parametrize(
    ("logits", "shape", "bias"),
    [
        (torch.zeros(2, 8), V2, None),
        (torch.zeros(160), V2, None),
        (torch.zeros(2, 160), V2, torch.zeros(160)),
        (torch.zeros(2, 256), V3, None),
        (torch.zeros(2, 256), V3, torch.zeros(255)),
        (torch.zeros(2, 8), shape_of(8, 2, grouped=False, scoring="sigmoid"), None),
        (
            torch.zeros(2, 4),
            shape_of(4, 2, groups=(4, 2), method=RoutingMethod.NOAUX_TC, scoring="sigmoid"),
            torch.zeros(4),
        ),
    ],
)
def test_arguments_that_do_not_fit_together_are_refused(logits: Tensor, shape: MoEShape, bias: Tensor | None) -> None:
    with pytest.raises(ValueError, match="shape|scoring|experts_per_model_group"):
        route(logits, shape, bias=bias)
