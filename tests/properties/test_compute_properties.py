"""Every compute path equals the loop, and a row's result depends on this row alone."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from experts.compute import ExpertFFN, Pairs, expert_ffn_loop, make_expert_ffn
from experts.compute_cpu import why_no_kernel
from experts.compute_cuda import why_not_grouped
from experts.weights import LayerWeights

HIDDEN, EXPERTS = 64, 6
INNERS = (32, 40, 96)  # 40 needs padding
# Relative to the largest value: float32 differs by the order of additions; bfloat16 rounds inputs of the second
# matmul, each pair's output, and keeps 8 bits of each.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}

# A batch: for each row the set of its experts. Then the same row may be given alone, or in another order.
Batch = list[set[int]]
batches = st.lists(st.sets(st.integers(0, EXPERTS - 1)), min_size=0, max_size=40)
profile = settings(deadline=None, derandomize=True, max_examples=40)


def weights_of(inner: int, dtype: torch.dtype) -> LayerWeights:
    generator = torch.Generator().manual_seed(inner)
    w13 = torch.randn(EXPERTS, 2 * inner, HIDDEN, generator=generator) / HIDDEN**0.5
    w2 = torch.randn(EXPERTS, HIDDEN, inner, generator=generator) / inner**0.5
    return LayerWeights(w13=w13.to(dtype), w2=w2.to(dtype))


def inputs_of(num_rows: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(num_rows, HIDDEN, generator=torch.Generator().manual_seed(num_rows)).to(dtype)


def pairs_of(batch: Batch) -> Pairs:
    row = [r for r, experts in enumerate(batch) for _ in experts]
    expert = [e for experts in batch for e in sorted(experts)]
    # A weight that belongs to the pair and not to its place, so that a row keeps it wherever it stands.
    weight = [0.1 + 0.37 * e / EXPERTS + 0.05 * len(experts) for experts in batch for e in sorted(experts)]
    return Pairs(
        row=torch.tensor(row, dtype=torch.int32),
        expert=torch.tensor(expert, dtype=torch.int32),
        weight=torch.tensor(weight, dtype=torch.float32),
    )


def _paths() -> list[object]:
    missing = {"kernel": why_no_kernel, "grouped": why_not_grouped}
    reasons = {path: why(weights_of(32, torch.float32)) for path, why in missing.items()}
    skip = {path: [pytest.mark.skip(reason=reason)] if reason else [] for path, reason in reasons.items()}
    return [pytest.param(path, marks=marks) for path, marks in skip.items()]


@pytest.fixture(scope="module")
def ffn_of() -> Callable[[str, int, torch.dtype], ExpertFFN]:
    """The prepared path, made once for each kind of weights."""
    made: dict[tuple[str, int, torch.dtype], ExpertFFN] = {}

    def make(path: str, inner: int, dtype: torch.dtype) -> ExpertFFN:
        key = (path, inner, dtype)
        if key not in made:
            made[key] = make_expert_ffn({0: weights_of(inner, dtype)}, path=path)  # pyright: ignore[reportArgumentType]
        return made[key]

    return make


@pytest.mark.parametrize("path", _paths())
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("inner", INNERS)
@profile
@given(batch=batches)
@example(batch=[])  # no row at all
@example(batch=[set(), set()])  # rows without an expert here
@example(batch=[{3}])  # a single row
@example(batch=[{2}] * 40)  # all rows to one expert
@example(batch=[set(range(EXPERTS))] * 3)  # every expert
def test_a_fast_path_equals_the_loop(
    ffn_of: Callable[[str, int, torch.dtype], ExpertFFN], path: str, dtype: torch.dtype, inner: int, batch: Batch
) -> None:
    x, pairs = inputs_of(len(batch), dtype), pairs_of(batch)
    expected = expert_ffn_loop(x, weights_of(inner, dtype), pairs)
    found = ffn_of(path, inner, dtype)(0, x, pairs)
    assert found.shape == expected.shape and found.dtype == torch.float32
    if batch:
        scale = max(1.0, float(expected.abs().max()))
        assert float((found - expected).abs().max()) <= TOLERANCE[dtype] * scale


@pytest.mark.parametrize("path", [p for p in _paths() if p.values[0] == "kernel"])  # pyright: ignore
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("num_threads", [1, 2])
@profile
@given(batch=batches.filter(bool), data=st.data())
def test_with_the_kernel_a_row_has_the_same_bits_in_any_batch(
    ffn_of: Callable[[str, int, torch.dtype], ExpertFFN],
    path: str,
    dtype: torch.dtype,
    num_threads: int,
    batch: Batch,
    data: st.DataObject,
) -> None:
    """Joining rows of several callers, and moving an expert to a process with more threads, changes no bit."""
    ffn = ffn_of(path, 40, dtype)
    x = inputs_of(len(batch), dtype)
    whole = ffn(0, x, pairs_of(batch))
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        order = data.draw(st.permutations(range(len(batch))))
        taken = order[: data.draw(st.integers(1, len(batch)))]
        part = ffn(0, x[taken], pairs_of([batch[i] for i in taken]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(part, whole[taken])


@pytest.mark.parametrize("path", _paths())
@profile
@given(batch=batches.filter(bool), data=st.data())
def test_rows_in_another_order_give_the_results_in_that_order(
    ffn_of: Callable[[str, int, torch.dtype], ExpertFFN], path: str, batch: Batch, data: st.DataObject
) -> None:
    ffn = ffn_of(path, 32, torch.float32)
    x = inputs_of(len(batch), torch.float32)
    order = data.draw(st.permutations(range(len(batch))))
    found = ffn(0, x[order], pairs_of([batch[i] for i in order]))
    torch.testing.assert_close(found, ffn(0, x, pairs_of(batch))[order], rtol=1e-5, atol=1e-5)
