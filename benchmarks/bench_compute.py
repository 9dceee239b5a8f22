"""Which way to compute the experts of a group on a CPU: microseconds per call against the time to read the weights.

    python benchmarks/bench_compute.py [--quick]

One thread, hidden 1024, inner 192, 16 experts, 1 to 4 experts per row. Calls go round several layers, so that weights
come from memory as they do in serving, and not from a cache that holds one layer. The floor is the bytes of the
experts that the rows use, divided by the measured memory bandwidth.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import silu

from experts.compute import Pairs, make_expert_ffn
from experts.weights import LayerWeights

HIDDEN, INNER, NUM_EXPERTS, MAX_PER_ROW = 1024, 192, 16, 4
ROWS = (1, 8, 32, 64, 256)
LAYERS_BYTES = 320 << 20  # of weights to go round: several times the last cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, for a first look")
    budget_s = 0.1 if parser.parse_args().quick else 0.5
    torch.set_num_threads(1)
    bandwidth = measure_bandwidth()
    print(f"{torch.backends.cpu.get_cpu_capability()}, 1 thread, memory bandwidth {bandwidth / 1e9:.1f} GB/s\n")
    for dtype in (torch.bfloat16, torch.float32):
        print(f"### {str(dtype).removeprefix('torch.')}, microseconds per call (median)\n")
        layers = make_layers(dtype)
        paths: Mapping[str, Callable[[int, Tensor, Pairs], Tensor]] = {
            "loop": make_expert_ffn(dict(layers), path="loop"),
            "per expert": PerExpertFFN(dict(layers)),
            "bmm": BmmFFN(dict(layers)),
            "grouped_mm": make_expert_ffn(dict(layers), path="grouped"),
            "kernel": make_expert_ffn(dict(layers), path="kernel"),
        }
        print("| rows | pairs | experts used | " + " | ".join(paths) + " | floor | kernel / floor |")
        print("| ---: " * (len(paths) + 5) + "|")
        for num_rows in ROWS:
            print_row(num_rows, dtype, paths, len(layers), bandwidth, budget_s)
        print()


def print_row(
    num_rows: int,
    dtype: torch.dtype,
    paths: Mapping[str, Callable[[int, Tensor, Pairs], Tensor]],
    num_layers: int,
    bandwidth: float,
    budget_s: float,
) -> None:
    x = torch.randn(num_rows, HIDDEN).to(dtype)
    pairs = make_pairs(num_rows)
    used = int(pairs.expert.unique().numel())
    floor_us = used * 3 * HIDDEN * INNER * dtype.itemsize / bandwidth * 1e6
    timed = {
        name: median_us(lambda i, ffn=ffn: ffn(i % num_layers, x, pairs), budget_s)
        for name, ffn in paths.items()
        if name != "loop" or num_rows <= 64  # seconds otherwise
    }
    cells = [f"{timed[name]:.0f}" if name in timed else "-" for name in paths]
    print(f"| {num_rows} | {pairs.num_pairs} | {used} | {' | '.join(cells)} | {floor_us:.0f} |", end="")
    print(f" {timed['kernel'] / floor_us:.1f} |", flush=True)


class PerExpertFFN:
    """The usual torch form: for each expert in use, three matmuls over its rows."""

    def __init__(self, layers: dict[int, LayerWeights]) -> None:
        self._layers = layers

    def __call__(self, layer: int, x: Tensor, pairs: Pairs) -> Tensor:
        weights = self._layers[layer]
        out = torch.zeros(x.shape, dtype=torch.float32)
        for expert in pairs.expert.unique().tolist():
            chosen = (pairs.expert == expert).nonzero().squeeze(1)
            rows = pairs.row[chosen]
            gate, up = (x[rows] @ weights.w13[expert].T).chunk(2, dim=1)
            y = (silu(gate) * up) @ weights.w2[expert].T
            out.index_add_(0, rows, y.float() * pairs.weight[chosen].unsqueeze(1))
        return out


class BmmFFN:
    """One batched matmul over all experts, each with as many slots as the fullest one has pairs."""

    def __init__(self, layers: dict[int, LayerWeights]) -> None:
        self._layers = layers

    def __call__(self, layer: int, x: Tensor, pairs: Pairs) -> Tensor:
        weights = self._layers[layer]
        n = weights.num_local_experts
        order = torch.argsort(pairs.expert, stable=True)
        expert = pairs.expert[order].long()
        counts = torch.bincount(expert, minlength=n)
        slot = torch.arange(len(order)) - (counts.cumsum(0) - counts)[expert]
        padded = x.new_zeros(n, int(counts.max()), x.shape[1])
        padded[expert, slot] = x[pairs.row[order]]
        gate, up = torch.bmm(padded, weights.w13.transpose(1, 2)).chunk(2, dim=2)
        y = torch.bmm(silu(gate) * up, weights.w2.transpose(1, 2))[expert, slot]
        out = torch.zeros(x.shape, dtype=torch.float32)
        return out.index_add_(0, pairs.row[order], y.float() * pairs.weight[order].unsqueeze(1))


def make_layers(dtype: torch.dtype) -> dict[int, LayerWeights]:
    one = NUM_EXPERTS * 3 * HIDDEN * INNER * dtype.itemsize
    w13 = (torch.randn(NUM_EXPERTS, 2 * INNER, HIDDEN) / HIDDEN**0.5).to(dtype)
    w2 = (torch.randn(NUM_EXPERTS, HIDDEN, INNER) / INNER**0.5).to(dtype)
    return {i: LayerWeights(w13=w13.clone(), w2=w2.clone()) for i in range(LAYERS_BYTES // one)}


def make_pairs(num_rows: int) -> Pairs:
    """Each row uses 1 to MAX_PER_ROW experts, drawn evenly; the same ones at every run."""
    generator = torch.Generator().manual_seed(num_rows)
    row: list[int] = []
    expert: list[int] = []
    for r in range(num_rows):
        count = int(torch.randint(1, MAX_PER_ROW + 1, (1,), generator=generator))
        expert += sorted(torch.randperm(NUM_EXPERTS, generator=generator)[:count].tolist())
        row += [r] * count
    return Pairs(
        row=torch.tensor(row, dtype=torch.int32),
        expert=torch.tensor(expert, dtype=torch.int32),
        weight=torch.rand(len(row), generator=generator),
    )


def measure_bandwidth() -> float:
    """Bytes per second of one thread that reads memory: the best of a few sums over 256 MiB."""
    block = torch.ones(64 << 20, dtype=torch.float32)
    return block.nbytes / min(elapsed_s(lambda: block.sum()) for _ in range(7))


def median_us(call: Callable[[int], object], budget_s: float) -> float:
    """Median of as many calls as fit in the budget, at least five; the first two do not count."""
    call(0)
    call(1)
    times: list[float] = []
    while len(times) < 5 or sum(times) < budget_s:
        times.append(elapsed_s(lambda: call(len(times))))
    return statistics.median(times) * 1e6


def elapsed_s(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
