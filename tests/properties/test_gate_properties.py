"""What holds of every routing: device limits, distinct experts, weights as documented, and the fast path's equality."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from experts.compiled import compiled
from experts.shape import MoEShape, RoutingMethod
from router import gate_fast
from router.gate import Routing, route
from router.gate_fast import RoutingArrays, route_fast, warm_up
from router.gate_kernels import route_rows

CHECKED = settings(deadline=None, derandomize=True, max_examples=100)
CHECKED_WELL = settings(CHECKED, max_examples=400)

V2 = RoutingMethod.GROUP_LIMITED_GREEDY
V3 = RoutingMethod.NOAUX_TC


def shape_of(
    num_experts: int,
    top_k: int,
    groups: tuple[int, int] = (1, 1),
    method: RoutingMethod = RoutingMethod.GREEDY,
    *,
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
        scoring="sigmoid" if method is V3 else "softmax",
        norm_topk_prob=norm,
        grouped=grouped,
    )


SHAPES = [
    shape_of(160, 6, (8, 3), V2),
    shape_of(64, 6, (8, 3), V2, norm=True),
    shape_of(12, 4, (4, 2), V2),
    shape_of(8, 8, (2, 2), V2),
    shape_of(64, 6),
    shape_of(7, 3, norm=True),
    shape_of(400, 2),  # so few out of so many that torch.topk takes its other algorithm
    shape_of(256, 8, (8, 4), V3, norm=True),
    shape_of(64, 6, (8, 3), V3),
    shape_of(12, 3, (4, 2), V3, norm=True),
    replace(shape_of(64, 6, (8, 3), V3), scoring="softmax"),
    shape_of(128, 8, norm=True, grouped=False),
    shape_of(128, 8, grouped=False),
    shape_of(8, 2, norm=True, grouped=False),
    shape_of(8, 8, norm=True, grouped=False),
]


@st.composite
def batches(draw: st.DrawFn) -> tuple[NDArray[np.generic], MoEShape, NDArray[np.float32] | None]:
    """Logits as they come in a frame, full of ties and near-ties: few values, each with its next neighbours."""
    shape = draw(st.sampled_from(SHAPES))
    num_tokens = draw(st.integers(0, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size = draw(st.sampled_from([1e-6, 1e-2, 1.0, 8.0, 90.0]))
    if draw(st.booleans()):
        values = rng.normal(size=draw(st.integers(1, 40))).astype(np.float32) * np.float32(size)
        steps = draw(st.sampled_from([0, 1, 3, 40]))
        picked = rng.choice(values, (num_tokens, shape.num_experts)).view(np.int32)
        logits = (picked + rng.integers(-steps, steps + 1, picked.shape, np.int32)).view(np.float32)
        logits = np.where(np.isfinite(logits), logits, np.float32(0.0))
    else:
        logits = rng.normal(size=(num_tokens, shape.num_experts)).astype(np.float32) * np.float32(size)
    if draw(st.integers(0, 9)) == 0:
        strange = np.array([np.nan, np.inf, -np.inf], np.float32)
        logits = np.where(rng.random(logits.shape) < 0.02, rng.choice(strange, logits.shape), logits)
    bias = None
    if shape.uses_bias:
        bias = rng.choice(np.array([-0.5, 0.0, 0.125, 0.13], np.float32), shape.num_experts)
        bias *= np.float32(draw(st.sampled_from([0.0, 1.0, 20.0])))
    dtype = draw(st.sampled_from(["float32", "bfloat16", "float16"]))
    return as_frame(logits, dtype), shape, bias


def as_frame(logits: NDArray[np.float32], dtype: str) -> NDArray[np.generic]:
    """A read-only array of the dtype's bits at an odd address, as np.frombuffer gives it for a received frame."""
    narrow = torch.from_numpy(logits).to(getattr(torch, dtype))
    bits = narrow.view(torch.int16).numpy().view(np.uint16) if dtype == "bfloat16" else narrow.numpy()
    return np.frombuffer(b"\0" + bits.tobytes(), np.dtype(bits.dtype), offset=1).reshape(logits.shape)


def as_tensor(frame: NDArray[np.generic]) -> Tensor:
    if frame.dtype == np.uint16:
        return torch.from_numpy(np.array(frame).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(frame))


def twin_of(
    frame: NDArray[np.generic], shape: MoEShape, bias: NDArray[np.float32] | None, scale: float = 1.0
) -> Routing:
    return route(as_tensor(frame), shape, bias=None if bias is None else torch.from_numpy(bias.copy()), scale=scale)


def assert_equal(fast: RoutingArrays, twin: Routing) -> None:
    assert fast.topk_idx.dtype == np.int32 and fast.topk_weights.dtype == np.float32
    np.testing.assert_array_equal(fast.topk_idx, twin.topk_idx.numpy())
    np.testing.assert_allclose(fast.topk_weights, twin.topk_weights.numpy(), rtol=1e-6, atol=0, equal_nan=True)


@given(batches(), st.sampled_from([1.0, 2.5]))
@CHECKED_WELL
def test_the_fast_path_equals_the_twin_in_ties_and_near_ties_too(batch, scale: float) -> None:
    frame, shape, bias = batch
    scale = scale if shape.grouped else 1.0
    assert_equal(route_fast(frame, shape, bias=bias, scale=scale), twin_of(frame, shape, bias, scale))


@given(batches())
@CHECKED
def test_the_fast_path_equals_the_twin_where_torch_settles_ties_in_its_own_way(batch) -> None:
    frame, shape, bias = batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate_fast, "_torch_settles_ties_as_we_do", lambda: False)
        assert_equal(route_fast(frame, shape, bias=bias), twin_of(frame, shape, bias))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.num_experts}-{s.method}-{s.grouped}-{s.norm_topk_prob}")
def test_the_fast_path_equals_the_twin_on_thousands_of_ordinary_tokens(shape: MoEShape, dtype: str) -> None:
    rng = np.random.default_rng(3)
    frame = as_frame(rng.normal(size=(2000, shape.num_experts)).astype(np.float32), dtype)
    bias = rng.normal(size=shape.num_experts).astype(np.float32) if shape.uses_bias else None
    assert_equal(route_fast(frame, shape, bias=bias), twin_of(frame, shape, bias))


def test_ordinary_tokens_seldom_need_the_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    ask_twin = gate_fast._ask_twin
    warm_up(SHAPES[0])
    monkeypatch.setattr(
        gate_fast, "_ask_twin", lambda logits, *rest: asked.append(len(logits)) or ask_twin(logits, *rest)
    )
    rng = np.random.default_rng(5)
    for dtype in ("float32", "bfloat16"):
        route_fast(as_frame(rng.normal(size=(2000, 160)).astype(np.float32), dtype), SHAPES[0])
    assert sum(asked) <= 20, "under half a percent"


@given(batches())
@CHECKED
def test_a_token_visits_at_most_topk_group_groups_and_top_k_distinct_experts_in_order(batch) -> None:
    frame, shape, bias = batch
    topk_idx = twin_of(frame, shape, bias).topk_idx
    assert topk_idx.shape == (len(frame), shape.top_k)
    for row in topk_idx.tolist():
        assert row == sorted(set(row)) and row[0] >= 0 and row[-1] < shape.num_experts
        assert len({expert // shape.experts_per_model_group for expert in row}) <= shape.topk_group


@given(batches())
@CHECKED
def test_weights_are_the_scores_of_the_chosen_renormalised_only_when_asked(batch) -> None:
    frame, shape, bias = batch
    logits = as_tensor(frame)
    narrow = not shape.grouped and logits.dtype != torch.float32
    if narrow or not logits.isfinite().all():
        return  # without groups, vLLM's softmax of narrow logits rounds at every step
    scores = logits.double().sigmoid() if shape.scoring == "sigmoid" else logits.double().softmax(dim=-1)
    topk_idx, topk_weights = twin_of(frame, shape, bias)
    expected = scores.gather(1, topk_idx.long())
    if shape.norm_topk_prob:
        expected = expected / expected.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(topk_weights.double(), expected, rtol=1e-4, atol=1e-30)


@given(batches(), st.randoms(use_true_random=False))
@CHECKED
def test_permuting_tokens_permutes_the_routing(batch, random) -> None:
    frame, shape, bias = batch
    if shape.scoring == "sigmoid" and shape.num_experts % 32:
        return  # torch's sigmoid rounds differently in the last elements of a batch that is no multiple of 32
    order = list(range(len(frame)))
    random.shuffle(order)
    straight, permuted = twin_of(frame, shape, bias), twin_of(frame[order], shape, bias)
    assert torch.equal(straight.topk_idx[order], permuted.topk_idx)
    torch.testing.assert_close(straight.topk_weights[order], permuted.topk_weights, rtol=0, atol=0, equal_nan=True)


def test_a_batch_in_fortran_order_or_sliced_is_routed_like_its_copy() -> None:
    logits = np.random.default_rng(2).normal(size=(6, 128)).astype(np.float32)
    shape = SHAPES[4]
    for view in (np.asfortranarray(logits[:, :64]), logits[::2, ::2], logits[:, :64]):
        assert_equal(route_fast(view, shape), twin_of(np.ascontiguousarray(view), shape, None))


def test_dtypes_that_are_no_logits_are_refused() -> None:
    with pytest.raises(ValueError, match="float64"):
        route_fast(np.zeros((1, 64)), SHAPES[4])
    with pytest.raises(ValueError, match="shape"):
        route_fast(np.zeros((1, 63), np.float32), SHAPES[4])


def test_all_kinds_of_frames_share_one_compiled_version() -> None:
    for shape in SHAPES:
        warm_up(shape)
    assert len(compiled(route_rows).nopython_signatures) == 1  # pyright: ignore[reportFunctionMemberAccess]
