"""The work of an expert group: the weighted sum of its experts' outputs for each row of one layer.

Three paths with one meaning: a plain loop (the twin of the others, and what is left when nothing else runs), compiled
loops for CPUs, and torch's grouped matmul. A row's result depends on this row alone: neither on the other rows of the
batch nor on its place among them.
"""

import logging
from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import silu

from experts.compute_cpu import KernelFFN, why_no_kernel
from experts.compute_cuda import GroupedFFN, why_not_grouped
from experts.errors import ConfigError
from experts.pairs import Pairs
from experts.weights import LayerWeights

__all__ = ["ExpertFFN", "Pairs", "Path", "expert_ffn_loop", "make_expert_ffn"]

log = logging.getLogger(__name__)

Path = Literal["auto", "loop", "kernel", "grouped"]


class ExpertFFN(Protocol):
    """Computes rows of one layer with the experts that it holds. One call at a time."""

    def __call__(self, layer: int, x: Tensor, pairs: Pairs, out: Tensor | None = None) -> Tensor:
        """x: [num_rows, hidden_size] in the dtype of the weights -> partial sums [num_rows, hidden_size] float32.

        out: where they are written to, and what is returned; None: new memory.
        What make_expert_ffn gives takes and returns tensors of the host, wherever the weights are.

        Raises ValueError when x or pairs do not fit the weights; KeyError for a layer that is not held.
        """
        ...


def make_expert_ffn(weights: dict[int, LayerWeights], *, path: Path = "auto") -> ExpertFFN:
    """Prepares the weights of a group, layer -> LayerWeights, for computing.

    Takes the layers out of the dict as it goes, so that no layer is in memory twice for long: hand in a copy
    (`dict(weights)`) to keep them.
    path: "auto" takes the fastest one that runs here, and logs a warning when that is the loop.
    Raises ConfigError when the path that was asked for does not run here.
    """
    if not weights:
        raise ConfigError("no layer with experts was given")
    first = next(iter(weights.values()))
    chosen = _choose(first, path)
    paths: dict[Path, Callable[[dict[int, LayerWeights]], ExpertFFN]] = {
        "loop": LoopFFN,
        "kernel": KernelFFN,
        "grouped": GroupedFFN,
    }
    ffn = paths[chosen](weights)
    on_host = first.w13.device.type == "cpu"
    return ffn if on_host else OnDevice(ffn, first.w13.device, num_local_experts=first.num_local_experts)


class OnDevice:
    """Another path whose weights are on a GPU, for rows that come from the host and sums that go back there."""

    def __init__(self, ffn: ExpertFFN, device: torch.device, *, num_local_experts: int) -> None:
        self.ffn = ffn
        self._device = device
        self._num_local_experts = num_local_experts

    def __call__(self, layer: int, x: Tensor, pairs: Pairs, out: Tensor | None = None) -> Tensor:
        if pairs.num_pairs:
            pairs.check_experts(self._num_local_experts)  # here, where a look at them waits for no device
        y = self.ffn(layer, x.to(self._device), pairs.to(self._device))
        return y.cpu() if out is None else out.copy_(y)


def expert_ffn_loop(x: Tensor, weights: LayerWeights, pairs: Pairs) -> Tensor:
    """The obvious form, one pair after the other, all in float32.

    x: [num_rows, hidden_size] -> [num_rows, hidden_size] float32, pairs of a row added in their order.
    """
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for row, expert, weight in zip(pairs.row.tolist(), pairs.expert.tolist(), pairs.weight.tolist(), strict=True):
        gate, up = (weights.w13[expert].float() @ x[row].float()).chunk(2)
        out[row] += weight * (weights.w2[expert].float() @ (silu(gate) * up))
    return out


class LoopFFN:
    """expert_ffn_loop behind the protocol."""

    def __init__(self, weights: dict[int, LayerWeights]) -> None:
        self._layers = {layer: weights.pop(layer) for layer in list(weights)}

    def __call__(self, layer: int, x: Tensor, pairs: Pairs, out: Tensor | None = None) -> Tensor:
        weights = self._layers[layer]
        weights.check_input(x)
        if pairs.num_pairs:
            pairs.check_experts(weights.num_local_experts)
        y = expert_ffn_loop(x, weights, pairs)
        return y if out is None else out.copy_(y)


def _choose(example: LayerWeights, path: Path) -> Literal["loop", "kernel", "grouped"]:
    if path == "loop":
        return "loop"
    wanted = path if path != "auto" else ("grouped" if example.w13.is_cuda else "kernel")
    reason = why_not_grouped(example) if wanted == "grouped" else why_no_kernel(example)
    if reason is None:
        return wanted
    if path != "auto":
        raise ConfigError(f"expert compute path {path!r} does not run here: {reason}; use 'auto' or 'loop'")
    log.warning("experts are computed by the slow plain loop", extra={"wanted": wanted, "reason": reason})
    return "loop"
