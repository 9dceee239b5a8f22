"""The grouped path on a CUDA device: equal to the loop, the same bits at every run, and none asked of the host."""

import pytest
import torch

from experts.compute import OnDevice, Pairs, expert_ffn_loop, make_expert_ffn
from experts.compute_cuda import GroupedFFN
from experts.weights import LayerWeights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

HIDDEN, EXPERTS = 256, 16


def weights_of(inner: int) -> LayerWeights:
    generator = torch.Generator().manual_seed(inner)
    w13 = torch.randn(EXPERTS, 2 * inner, HIDDEN, generator=generator) / HIDDEN**0.5
    w2 = torch.randn(EXPERTS, HIDDEN, inner, generator=generator) / inner**0.5
    return LayerWeights(w13=w13.to("cuda", torch.bfloat16), w2=w2.to("cuda", torch.bfloat16))


def pairs_of(num_rows: int, most: int = 4) -> Pairs:
    """Row r uses r % (most + 1) experts: some rows none, some several."""
    generator = torch.Generator().manual_seed(num_rows)
    chosen = [sorted(torch.randperm(EXPERTS, generator=generator)[: r % (most + 1)].tolist()) for r in range(num_rows)]
    row = [r for r, experts in enumerate(chosen) for _ in experts]
    return Pairs(
        row=torch.tensor(row, dtype=torch.int32, device="cuda"),
        expert=torch.tensor([e for experts in chosen for e in experts], dtype=torch.int32, device="cuda"),
        weight=torch.rand(len(row), generator=generator).cuda(),
    )


def test_auto_takes_the_grouped_path_on_cuda() -> None:
    ffn = make_expert_ffn({0: weights_of(64)})
    assert isinstance(ffn, OnDevice)
    assert isinstance(ffn.ffn, GroupedFFN)


def test_rows_of_the_host_come_back_to_the_host() -> None:
    x, pairs = torch.randn(9, HIDDEN, dtype=torch.bfloat16), pairs_of(9).to(torch.device("cpu"))
    found = make_expert_ffn({0: weights_of(64)})(0, x, pairs)
    assert found.device.type == "cpu"
    torch.testing.assert_close(found, expert_ffn_loop(x, weights_of(64).to(x.device), pairs), rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("inner", [64, 72])
@pytest.mark.parametrize("num_rows", [1, 2, 7, 64, 300])
def test_the_grouped_path_equals_the_loop(inner: int, num_rows: int) -> None:
    x = torch.randn(num_rows, HIDDEN, device="cuda", dtype=torch.bfloat16)
    pairs = pairs_of(num_rows)
    expected = expert_ffn_loop(x, weights_of(inner), pairs)
    found = make_expert_ffn({0: weights_of(inner)}, path="grouped")(0, x, pairs)
    torch.testing.assert_close(found, expected.cpu(), rtol=3e-2, atol=3e-2)


def test_the_same_input_gives_the_same_bits() -> None:
    x = torch.randn(200, HIDDEN, device="cuda", dtype=torch.bfloat16)
    ffn = make_expert_ffn({0: weights_of(64)}, path="grouped")
    first = ffn(0, x, pairs_of(200))
    assert all(torch.equal(ffn(0, x, pairs_of(200)), first) for _ in range(5))
