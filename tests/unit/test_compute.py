"""Expert compute: which path is taken, what is refused, and what happens to the weights."""

import gc
import logging
import weakref

import pytest
import torch
from vllm_kernels import fused_moe, load_vllm_kernels

from cluster.vllm_rounding import kernel_truncates
from experts import compute
from experts.compute import LoopFFN, Pairs, expert_ffn_loop, make_expert_ffn
from experts.compute_cpu import KernelFFN, why_no_kernel
from experts.compute_cuda import GroupedFFN
from experts.errors import ConfigError
from experts.pairs import sum_rows
from experts.weights import LayerWeights


def some_weights(n: int = 4, hidden: int = 64, inner: int = 32, dtype: torch.dtype = torch.float32) -> LayerWeights:
    generator = torch.Generator().manual_seed(n + hidden + inner)
    w13 = torch.randn(n, 2 * inner, hidden, generator=generator) / hidden**0.5
    w2 = torch.randn(n, hidden, inner, generator=generator) / inner**0.5
    return LayerWeights(w13=w13.to(dtype), w2=w2.to(dtype))


def some_pairs(row: list[int], expert: list[int], weight: list[float] | None = None) -> Pairs:
    return Pairs(
        row=torch.tensor(row, dtype=torch.int32),
        expert=torch.tensor(expert, dtype=torch.int32),
        weight=torch.tensor(weight or [1.0] * len(row)),
    )


needs_vllm_kernels = pytest.mark.skipif(not load_vllm_kernels(), reason="vLLM's CPU kernels are not here")


def test_the_loop_is_the_formula() -> None:
    weights = LayerWeights(w13=torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]), w2=torch.tensor([[[5.0]], [[6.0]]]))
    out = expert_ffn_loop(torch.tensor([[0.5], [2.0]]), weights, some_pairs([0, 1, 1], [1, 0, 1], [1.0, 0.25, 0.5]))

    def ffn(x: float, gate: float, up: float, down: float) -> float:
        g = torch.tensor(gate * x)
        return float(g * torch.sigmoid(g)) * up * x * down

    expected = [ffn(0.5, 3, 4, 6), 0.25 * ffn(2, 1, 2, 5) + 0.5 * ffn(2, 3, 4, 6)]
    assert out.flatten().tolist() == pytest.approx(expected)


def test_auto_takes_the_kernel_on_a_cpu() -> None:
    assert isinstance(make_expert_ffn({1: some_weights()}), KernelFFN)


def test_without_the_kernel_auto_is_the_loop_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compute, "why_no_kernel", lambda example: "such a reason")
    with caplog.at_level(logging.WARNING):
        assert isinstance(make_expert_ffn({1: some_weights()}), LoopFFN)
    assert [record.__dict__["reason"] for record in caplog.records] == ["such a reason"]
    with pytest.raises(ConfigError, match="such a reason"):
        make_expert_ffn({1: some_weights()}, path="kernel")


def test_weights_that_the_kernel_cannot_take_have_a_reason() -> None:
    assert "multiple of 32" in str(why_no_kernel(some_weights(hidden=40)))
    assert "torch.float64" in str(why_no_kernel(some_weights(dtype=torch.float64)))
    assert "meta" in str(
        why_no_kernel(LayerWeights(w13=torch.empty(1, 2, 32, device="meta"), w2=torch.empty(1, 32, 1)))
    )


def test_a_hidden_size_that_the_kernel_cannot_take_goes_to_the_loop() -> None:
    assert isinstance(make_expert_ffn({1: some_weights(hidden=40)}), LoopFFN)


def test_no_layer_is_refused() -> None:
    with pytest.raises(ConfigError):
        make_expert_ffn({})


@pytest.mark.parametrize("path", ["loop", "kernel", "grouped"])
def test_bad_input_is_a_value_error_and_never_reaches_a_kernel(path: str) -> None:
    ffn = make_expert_ffn({1: some_weights()}, path=path)  # pyright: ignore[reportArgumentType]
    for expert in (-1, 4, 2**30):
        with pytest.raises(ValueError, match="num_local_experts"):
            ffn(1, torch.zeros(1, 64), some_pairs([0], [expert]))
    for x in (torch.zeros(1, 32), torch.zeros(1, 64, dtype=torch.bfloat16), torch.zeros(64)):
        with pytest.raises(ValueError, match="hidden_size"):
            ffn(1, x, some_pairs([0], [0]))
    with pytest.raises(KeyError):
        ffn(2, torch.zeros(1, 64), some_pairs([0], [0]))


def test_packed_and_plain_weights_are_never_both_kept() -> None:
    layers = {1: some_weights(), 2: some_weights(inner=40)}
    plain = [weakref.ref(tensor) for weights in layers.values() for tensor in (weights.w13, weights.w2)]
    ffn = make_expert_ffn(layers, path="kernel")
    gc.collect()
    assert not layers and all(ref() is None for ref in plain)
    assert ffn(2, torch.ones(1, 64), some_pairs([0], [3])).abs().sum() > 0


def test_a_row_without_experts_is_zero_and_one_pair_per_row_needs_no_sum() -> None:
    y = torch.tensor([[1.0], [2.0], [4.0]])
    assert sum_rows(y, some_pairs([0, 2, 2], [0, 1, 2]), 3).flatten().tolist() == [1.0, 0.0, 6.0]
    assert sum_rows(y, some_pairs([0, 1, 2], [0, 0, 0]), 3).flatten().tolist() == [1.0, 2.0, 4.0]


def test_results_do_not_share_memory_with_the_input_or_each_other() -> None:
    for ffn in (LoopFFN({1: some_weights()}), GroupedFFN({1: some_weights()}), make_expert_ffn({1: some_weights()})):
        x = torch.ones(1, 64)
        first = ffn(1, x, some_pairs([0], [0]))
        kept = first.clone()
        ffn(1, x * 2, some_pairs([0], [1]))
        assert torch.equal(first, kept) and torch.equal(x, torch.ones(1, 64))
        out = torch.full((1, 64), torch.nan)
        assert ffn(1, x, some_pairs([0], [0]), out) is out
        assert torch.equal(out, kept)
        assert ffn(1, x, some_pairs([], []), out) is out and not out.any()


@needs_vllm_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_sums_split_over_groups_end_as_vllms_kernel_ends(dtype: torch.dtype) -> None:
    weights = some_weights(n=6, hidden=64, inner=96, dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(40, 64, generator=generator).to(dtype)
    chosen = torch.stack([torch.randperm(6, generator=generator)[:4].sort().values for _ in range(40)])
    share = torch.rand(40, 4, generator=generator)
    whole = fused_moe(x, weights.w13, weights.w2, share, chosen.int())
    ffn = make_expert_ffn({0: weights})
    halves = []
    for of_half in (chosen < 3, chosen >= 3):  # two expert groups, each adding up its own experts
        row, slot = torch.nonzero(of_half, as_tuple=True)
        halves.append(ffn(0, x, Pairs(row=row.int(), expert=chosen[row, slot].int(), weight=share[row, slot])))
    found = halves[0] + halves[1]
    ended = (found.view(torch.int32) & -65536).view(torch.float32) if kernel_truncates(dtype) else found
    # The order of the additions differs, so that a sum on the edge between two values may fall either way.
    assert (ended.to(dtype) == whole).float().mean() > 0.99


@needs_vllm_kernels
def test_how_vllms_kernel_ends_its_sums_is_found_out_and_not_assumed() -> None:
    assert not kernel_truncates(torch.float32)
    x = torch.zeros(1, 32, dtype=torch.bfloat16)
    x[0, 0] = 1.0
    w13 = torch.zeros(1, 64, 32, dtype=torch.bfloat16)
    w13[0, :32, 0], w13[0, 32:, 0] = 64.0, 1 / 64
    identity = torch.eye(32, dtype=torch.bfloat16).unsqueeze(0)
    just_below_two = torch.tensor([[2 - 2**-9]])  # nearest is 2, cut off it is the value below
    out = fused_moe(x, w13, identity, just_below_two, torch.zeros(1, 1, dtype=torch.int32))
    assert (out < 2).all() == kernel_truncates(torch.bfloat16)


@needs_vllm_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_expert_of_a_row_has_the_bits_of_vllms_kernel(dtype: torch.dtype) -> None:
    weights = some_weights(n=3, hidden=128, inner=96, dtype=dtype)
    x = torch.randn(20, 128, generator=torch.Generator().manual_seed(4)).to(dtype)
    expert, share = torch.arange(20, dtype=torch.int32) % 3, torch.linspace(0.1, 1, 20)
    whole = fused_moe(x, weights.w13, weights.w2, share.view(-1, 1), expert.view(-1, 1))
    pairs = Pairs(row=torch.arange(20, dtype=torch.int32), expert=expert, weight=share)
    found = make_expert_ffn({0: weights})(0, x, pairs)
    if kernel_truncates(dtype):
        found = (found.view(torch.int32) & -65536).view(torch.float32)
    # vLLM's builds for older CPUs have another exp; in float32 its sums are in another order.
    assert (found.to(dtype) == whole).float().mean() > (0.99 if dtype is torch.bfloat16 else 0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_several_threads_compute_the_same_bits(dtype: torch.dtype) -> None:
    weights = some_weights(n=5, hidden=96, inner=48, dtype=dtype)
    x = torch.randn(50, 96, generator=torch.Generator().manual_seed(5)).to(dtype)
    pairs = some_pairs([i // 2 for i in range(100)], [(i // 2 + 2 * (i % 2)) % 5 for i in range(100)])
    before, results = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(make_expert_ffn({0: weights})(0, x, pairs))
    torch.set_num_threads(before)
    assert torch.equal(*results)


def test_a_row_that_is_not_there_is_a_value_error_in_the_kernel() -> None:
    with pytest.raises(ValueError, match="not one of the 2"):
        make_expert_ffn({1: some_weights()}, path="kernel")(1, torch.zeros(2, 64), some_pairs([2], [0]))
