"""Expert compute on a CPU with the compiled loops of experts/tiles.py: weights are read once, sums are float32.

16-bit weights stay 16 bits: activations are rounded to that type, as one process rounds them, and what comes of the
second matrix is not rounded at all (docs/adr/0003).
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from experts.pairs import Pairs
from experts.room import Room
from experts.tiles import TILE, activate, arrange, compute, project
from experts.vectors import LANES, Kind
from experts.weights import LayerWeights, check_rows, pad_intermediate

_KINDS = {torch.float32: Kind.FLOAT32, torch.bfloat16: Kind.BFLOAT16, torch.float16: Kind.FLOAT16}
_CACHE_LINE_BYTES = 64

Units = NDArray[np.int32]  # one float32 each, or two neighbours of 16 bits
Floats = NDArray[np.float32]


def why_no_kernel(example: LayerWeights) -> str | None:
    """None when KernelFFN can take such weights, else the reason as part of a sentence."""
    if example.w13.device.type != "cpu":
        return f"the weights are on {example.w13.device.type}"
    if example.w13.dtype not in _KINDS:
        return f"it does not compute in {example.w13.dtype}"
    if example.hidden_size % TILE:
        return f"the hidden size {example.hidden_size} is not a multiple of {TILE}"
    return None


class KernelFFN:
    """Holds the weights of a group in the order in which the loops read them. Ask why_no_kernel first.

    Computes on as many threads as torch does when it is made.
    """

    def __init__(self, weights: dict[int, LayerWeights]) -> None:
        """weights: emptied as it goes; at most one layer is in memory both packed and unpacked."""
        example = next(iter(weights.values()))
        kind = _KINDS[example.w13.dtype]
        self._kind = kind.value(0)
        self._dtype, self._hidden_size = example.w13.dtype, example.hidden_size
        self._num_experts = example.num_local_experts
        del example
        self._layers = {layer: _pack(weights.pop(layer)) for layer in list(weights)}
        self._inner_size = max(w13.shape[1] * LANES for w13, _ in self._layers.values())
        self._room = Room()
        self._threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="kernel") if self._threads > 1 else None
        self._warm_up()

    def __call__(self, layer: int, x: Tensor, pairs: Pairs, out: Tensor | None = None) -> Tensor:
        """x: [num_rows, hidden_size] -> partial sums [num_rows, hidden_size] float32; as experts/compute.ExpertFFN."""
        w13, w2 = self._layers[layer]
        check_rows(x, hidden_size=self._hidden_size, dtype=self._dtype)
        self._room.clear()
        rows = x.contiguous().numpy() if x.dtype is torch.float32 else self._widened(x)
        out = torch.zeros(x.shape) if out is None else out.zero_()
        x_blocks, act = (self._floats(pairs.num_pairs, size) for size in (self._hidden_size, self._inner_size))
        run = compute if self._pool is None else self._compute_on_threads
        given = (rows, pairs.row.numpy(), pairs.expert.numpy(), pairs.weight.numpy())
        if not run(self._kind, *given, w13, w2, x_blocks, act, out.numpy()):
            pairs.check_experts(self._num_experts)
            raise ValueError(f"a pair names a row that is not one of the {len(x)}")
        return out

    def _warm_up(self) -> None:
        """Compiles the loops, or reads them from numba's cache, so that no request pays for it: 3 s, or a fraction."""
        zero = torch.zeros(1, dtype=torch.int32)
        pairs = Pairs(row=zero, expert=zero, weight=torch.zeros(1))
        self(next(iter(self._layers)), torch.zeros(1, self._hidden_size, dtype=self._dtype), pairs)

    def _widened(self, x: Tensor) -> Floats:
        rows = self._floats(*x.shape)
        torch.from_numpy(rows).copy_(x)
        return rows

    def _floats(self, num_rows: int, size: int) -> Floats:
        return self._room.take((num_rows, size), np.float32)

    def _compute_on_threads(
        self,
        kind: np.generic,
        x: Floats,
        row: NDArray[np.int32],
        expert: NDArray[np.int32],
        weight: Floats,
        w13: Units,
        w2: Units,
        x_blocks: Floats,
        act: Floats,
        out: Floats,
    ) -> bool:
        """experts/tiles.compute with the columns of each step shared out; the same bits."""
        begin = np.empty(len(w13) + 1, np.int64)
        distance, factor = np.empty(len(row), np.int64), np.empty(len(row), np.float32)
        if not arrange(x, row, expert, weight, x_blocks, begin, distance, factor, 4 * out.shape[1]):
            return False
        self._share(w13.shape[1], lambda first, last: activate(kind, begin, x_blocks, w13, act, first, last))
        self._share(w2.shape[1], lambda first, last: project(kind, begin, distance, factor, act, w2, out, first, last))
        return True

    def _share(self, num_tiles: int, work: Callable[[int, int], object]) -> None:
        """Calls work(first tile, last tile) for a share on each thread, and waits for all."""
        assert self._pool is not None
        bounds = [num_tiles * share // self._threads for share in range(self._threads + 1)]
        for done in [self._pool.submit(work, first, last) for first, last in pairwise(bounds)]:
            done.result()


def _pack(plain: LayerWeights) -> tuple[Units, Units]:
    """w13 as [n, width / 16, hidden units, 32], of which 16 columns are gate and 16 up; w2 as [n, hidden / 32, ...]."""
    padded = pad_intermediate(plain, LANES)
    gate = np.arange(padded.intermediate_size).reshape(-1, LANES)
    gate_and_up = np.concatenate([gate, gate + padded.intermediate_size], axis=1)
    return _tiled(padded.w13, gate_and_up), _tiled(padded.w2, np.arange(padded.hidden_size).reshape(-1, TILE))


def _tiled(matrices: Tensor, columns: NDArray[np.int64]) -> Units:
    """matrices: [n, num_columns, inner]; columns: [num_tiles, 32], which go into each tile."""
    units = matrices.contiguous().view(torch.int32).numpy()
    num_matrices, _, num_units = units.shape
    tiled = _aligned(num_matrices, len(columns), num_units, TILE)
    for source, target in zip(units, tiled, strict=True):
        target[...] = source[columns.reshape(-1)].reshape(len(columns), TILE, num_units).transpose(0, 2, 1)
    return tiled


def _aligned(*shape: int) -> Units:
    """Memory whose tiles begin with cache lines, as the loops expect; numpy asks for huge pages where there is much."""
    size_bytes = 4 * int(np.prod(shape))
    memory = np.empty(size_bytes + _CACHE_LINE_BYTES, np.uint8)
    begin = -memory.ctypes.data % _CACHE_LINE_BYTES
    return memory[begin : begin + size_bytes].view(np.int32).reshape(shape)
