"""The tokens of bench_micro: random, but routed by the product's own gate, as unevenly as a trained model does it."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.micro_cells import Cell, Work
from experts.pairs import Pairs
from experts.wire import HEADER_BYTES, PAIR_BYTES
from router.gate_fast import route_fast
from router.plan import GroupRows, make_plan

# Spread of what is common to all tokens in an expert's logit, beside 1 for what is a token's own: mean load over
# maximum load is then 0.7, between what docs/nano.md says of a balanced checkpoint and of one in training.
SKEW = 0.1
MAX_BATCHES, TOKENS_OF_ALL = 8, 2048
LOGITS_BYTES = 2  # a logit travels in the model's 16 bits
ROUTED_BYTES = 8  # expert int32 and weight float32


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """The tokens of one step at one layer, and where the gate sends them."""

    x: Tensor  # [num_tokens, hidden_size] in the cell's dtype
    logits: Tensor  # [num_tokens, num_experts] bfloat16
    topk_idx: NDArray[np.int32]  # [num_tokens, top_k]
    topk_weights: NDArray[np.float32]  # [num_tokens, top_k]
    plan: list[GroupRows]

    @property
    def logits_bits(self) -> NDArray[np.uint16]:
        """As the gate gets them from a frame."""
        return self.logits.view(torch.uint16).numpy()

    @property
    def num_rows(self) -> int:
        return sum(len(rows.tokens) for rows in self.plan)

    @property
    def num_pairs(self) -> int:
        return sum(rows.num_pairs for rows in self.plan)


def batches_of(cell: Cell) -> list[TokenBatch]:
    """A few batches of `cell.tokens`, the same in every run: fewer where a batch is so large that all are alike."""
    count = max(2, min(MAX_BATCHES, TOKENS_OF_ALL // cell.tokens))
    rng = np.random.default_rng([cell.tokens, cell.hidden, cell.experts])
    popularity = SKEW * rng.standard_normal(cell.experts)
    return [_batch(cell, popularity, rng) for _ in range(count)]


def _batch(cell: Cell, popularity: NDArray[np.float64], rng: np.random.Generator) -> TokenBatch:
    logits = torch.from_numpy(popularity + rng.standard_normal((cell.tokens, cell.experts))).to(torch.bfloat16)
    x = torch.from_numpy(rng.standard_normal((cell.tokens, cell.hidden), dtype=np.float32))
    routing = route_fast(logits.view(torch.uint16).numpy(), cell.shape)
    plan = make_plan(routing.topk_idx, routing.topk_weights, num_experts=cell.experts, num_groups=cell.groups)
    return TokenBatch(
        x=x.to(getattr(torch, cell.dtype)),
        logits=logits,
        topk_idx=routing.topk_idx,
        topk_weights=routing.topk_weights,
        plan=plan,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupBatch:
    """What one expert group gets of a batch."""

    x: Tensor  # [num_rows, hidden_size]
    pairs: Pairs


def group_batch(cell: Cell, batch: TokenBatch, number: int) -> GroupBatch:
    """The rows of one of the groups that the batch visits, another one for each `number`."""
    rows = batch.plan[number % len(batch.plan)]
    row, expert, bits = torch.from_numpy(rows.pairs)
    first = cell.shape.home_experts(rows.group, cell.groups).start
    pairs = Pairs(row=row, expert=expert - first, weight=bits.view(torch.float32))
    return GroupBatch(x=batch.x[torch.from_numpy(rows.tokens)], pairs=pairs)


# The least that must be done, see Work.


def gate_work(cell: Cell, batch: TokenBatch) -> Work:
    """Reads the logits, writes experts and weights."""
    return Work(num_bytes=cell.tokens * (cell.experts * LOGITS_BYTES + cell.shape.top_k * ROUTED_BYTES))


def plan_work(cell: Cell, batch: TokenBatch) -> Work:
    """Reads experts and weights, writes the token of each row and the three numbers of each pair."""
    read = cell.tokens * cell.shape.top_k * ROUTED_BYTES
    return Work(num_bytes=read + batch.num_rows * 8 + batch.num_pairs * PAIR_BYTES)


def trip_work(cell: Cell, batch: TokenBatch) -> Work:
    """Question, rows, partial sums and answer, each moved once; four messages follow one another."""
    x_bytes, logits_bytes = cell.hidden * batch.x.dtype.itemsize, cell.experts * LOGITS_BYTES
    question = HEADER_BYTES + cell.tokens * (x_bytes + logits_bytes)
    rows = len(batch.plan) * HEADER_BYTES + batch.num_rows * x_bytes + batch.num_pairs * PAIR_BYTES
    partials = len(batch.plan) * HEADER_BYTES + batch.num_rows * cell.hidden * 4
    answer = HEADER_BYTES + cell.tokens * x_bytes
    return Work(num_bytes=question + rows + partials + answer, hops=4)


def compute_work(cell: Cell, batch: GroupBatch) -> Work:
    """Reads the three matrices of every expert in use, and multiplies each pair with them."""
    shape = cell.shape
    numbers = 3 * shape.hidden_size * shape.moe_intermediate_size
    active = int(batch.pairs.expert.unique().numel())
    return Work(num_bytes=active * numbers * batch.x.dtype.itemsize, flops=2.0 * numbers * batch.pairs.num_pairs)
