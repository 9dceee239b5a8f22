"""Expert compute: which path is taken, what is refused, and what happens to the weights."""

import gc
import logging
import weakref

import pytest
import torch

from experts import compute_cpu
from experts.compute import LoopFFN, Pairs, expert_ffn_loop, make_expert_ffn
from experts.compute_cpu import KernelFFN, fused_moe, kernel_truncates, pack, why_no_kernel
from experts.compute_cpu16 import KernelFFN16
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


needs_kernel = pytest.mark.skipif(why_no_kernel(some_weights()) is not None, reason="vLLM's CPU kernel is not here")


def test_the_loop_is_the_formula() -> None:
    weights = LayerWeights(w13=torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]), w2=torch.tensor([[[5.0]], [[6.0]]]))
    out = expert_ffn_loop(torch.tensor([[0.5], [2.0]]), weights, some_pairs([0, 1, 1], [1, 0, 1], [1.0, 0.25, 0.5]))

    def ffn(x: float, gate: float, up: float, down: float) -> float:
        g = torch.tensor(gate * x)
        return float(g * torch.sigmoid(g)) * up * x * down

    expected = [ffn(0.5, 3, 4, 6), 0.25 * ffn(2, 1, 2, 5) + 0.5 * ffn(2, 3, 4, 6)]
    assert out.flatten().tolist() == pytest.approx(expected)


@needs_kernel
def test_auto_takes_the_kernel_on_a_cpu() -> None:
    assert isinstance(make_expert_ffn({1: some_weights()}), KernelFFN)


@pytest.mark.parametrize("reason", ["no library", "another signature"])
def test_without_the_kernel_auto_is_the_loop_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, reason: str
) -> None:
    monkeypatch.setattr(compute_cpu, "_load_library", lambda: reason)
    with caplog.at_level(logging.WARNING):
        assert isinstance(make_expert_ffn({1: some_weights()}), LoopFFN)
    assert [record.__dict__["reason"] for record in caplog.records] == [reason]
    with pytest.raises(ConfigError, match=reason):
        make_expert_ffn({1: some_weights()}, path="kernel")


def test_a_kernel_with_another_signature_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    if why_no_kernel(some_weights()) is not None:
        pytest.skip("vLLM's CPU kernel is not here")
    monkeypatch.setitem(compute_cpu._SCHEMAS, "cpu_fused_moe", "_C::cpu_fused_moe(Tensor x) -> ()")
    found = compute_cpu._load_library.__wrapped__()
    assert found is not None and "cpu_fused_moe has another signature" in found


def test_a_missing_vllm_is_a_reason_and_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute_cpu, "_ops", lambda: object())
    monkeypatch.setattr(compute_cpu.importlib.util, "find_spec", lambda name: None)
    assert compute_cpu._load_library.__wrapped__() == "vLLM is not installed"


def test_a_hidden_size_that_the_kernel_cannot_take_goes_to_the_loop() -> None:
    assert isinstance(make_expert_ffn({1: some_weights(hidden=40)}), LoopFFN)


def test_no_layer_is_refused() -> None:
    with pytest.raises(ConfigError):
        make_expert_ffn({})


@pytest.mark.parametrize("path", ["loop", "kernel", "grouped"])
def test_bad_input_is_a_value_error_and_never_reaches_a_kernel(path: str) -> None:
    if path == "kernel" and why_no_kernel(some_weights()) is not None:
        pytest.skip("vLLM's CPU kernel is not here")
    ffn = make_expert_ffn({1: some_weights()}, path=path)  # pyright: ignore[reportArgumentType]
    for expert in (-1, 4, 2**30):
        with pytest.raises(ValueError, match="num_local_experts"):
            ffn(1, torch.zeros(1, 64), some_pairs([0], [expert]))
    for x in (torch.zeros(1, 32), torch.zeros(1, 64, dtype=torch.bfloat16), torch.zeros(64)):
        with pytest.raises(ValueError, match="hidden_size"):
            ffn(1, x, some_pairs([0], [0]))
    with pytest.raises(KeyError):
        ffn(2, torch.zeros(1, 64), some_pairs([0], [0]))


@needs_kernel
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


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_sums_split_over_groups_end_as_one_call_of_the_kernel_ends(dtype: torch.dtype) -> None:
    weights = some_weights(n=6, hidden=64, inner=96, dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(40, 64, generator=generator).to(dtype)
    chosen = torch.stack([torch.randperm(6, generator=generator)[:4].sort().values for _ in range(40)])
    share = torch.rand(40, 4, generator=generator)
    whole = torch.empty_like(x)
    torch.ops._C.cpu_fused_moe(
        whole, x, pack(weights.w13), pack(weights.w2), None, None, share, chosen.int(), False, "silu", "vec"
    )
    ffn = make_expert_ffn({0: weights})
    halves = []
    for of_half in (chosen < 3, chosen >= 3):  # two expert groups, each adding up its own experts
        row, slot = torch.nonzero(of_half, as_tuple=True)
        halves.append(ffn(0, x, Pairs(row=row.int(), expert=chosen[row, slot].int(), weight=share[row, slot])))
    found = halves[0] + halves[1]
    assert isinstance(ffn, KernelFFN16)
    ended = (found.view(torch.int32) & -65536).view(torch.float32) if kernel_truncates(dtype) else found
    # The order of the additions differs, so that a sum on the edge between two values may fall either way.
    assert (ended.to(dtype) == whole).float().mean() > 0.99


@needs_kernel
def test_how_the_kernel_ends_its_sums_is_found_out_and_not_assumed() -> None:
    assert not kernel_truncates(torch.float32)
    out, x = torch.empty(1, 32, dtype=torch.bfloat16), torch.zeros(1, 32, dtype=torch.bfloat16)
    x[0, 0] = 1.0
    w13 = torch.zeros(1, 64, 32, dtype=torch.bfloat16)
    w13[0, :32, 0], w13[0, 32:, 0] = 64.0, 1 / 64
    identity = torch.eye(32, dtype=torch.bfloat16).unsqueeze(0)
    just_below_two = torch.tensor([2 - 2**-9])  # nearest is 2, cut off it is the value below
    fused_moe(out, x, pack(w13), pack(identity), torch.zeros(1, dtype=torch.int32), just_below_two)
    assert (out < 2).all() == kernel_truncates(torch.bfloat16)
