"""Which experts each row uses: the flat form in which the compute paths take it, and the way there and back."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """The (row, expert) pairs of a batch, sorted by row and then by expert. A row may have any number of them."""

    row: Tensor  # [num_pairs] int32, index into x, ascending
    expert: Tensor  # [num_pairs] int32, LOCAL index into w13 and w2, ascending within a row
    weight: Tensor  # [num_pairs] float32

    @property
    def num_pairs(self) -> int:
        return self.row.shape[0]

    def to(self, device: torch.device) -> "Pairs":
        return Pairs(row=self.row.to(device), expert=self.expert.to(device), weight=self.weight.to(device))

    def check_experts(self, num_local_experts: int) -> None:
        """Raises ValueError for an expert that is not here: a kernel would read memory that is not its own."""
        lowest, highest = (int(bound) for bound in torch.aminmax(self.expert))
        if lowest < 0 or highest >= num_local_experts:
            raise ValueError(f"local experts {lowest} to {highest} were asked for; {num_local_experts=}")

    def is_one_per_row(self, num_rows: int) -> bool:
        """True when pair p belongs to row p: then there is nothing to gather and nothing to sum."""
        return self.num_pairs == num_rows and torch.equal(self.row, torch.arange(num_rows).to(self.row))


def gather_rows(x: Tensor, pairs: Pairs) -> Tensor:
    """[num_rows, hidden] -> [num_pairs, hidden]: each pair's input, contiguous."""
    return x.contiguous() if pairs.is_one_per_row(x.shape[0]) else x.index_select(0, pairs.row)


def sum_rows(y: Tensor, pairs: Pairs, num_rows: int) -> Tensor:
    """[num_pairs, hidden] any float -> [num_rows, hidden] float32: each row's pairs, added in pair order."""
    if pairs.is_one_per_row(num_rows):
        return y.float()
    if y.is_cuda:
        # index_add_ adds in any order there; a segment is added from its first element to its last.
        bounds = torch.searchsorted(pairs.row, torch.arange(num_rows + 1, device=y.device, dtype=pairs.row.dtype))
        return torch.segment_reduce(y.float(), "sum", offsets=bounds, initial=0.0)
    return torch.zeros(num_rows, y.shape[1], dtype=torch.float32).index_add_(0, pairs.row, y.float())
