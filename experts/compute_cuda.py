"""Expert compute with torch's grouped matmul: the path for CUDA; it runs on a CPU as well, slower than the kernel."""

import torch
from torch import Tensor
from torch.nn.functional import silu

from experts.pairs import Pairs, gather_rows, sum_rows
from experts.weights import LayerWeights, pad_intermediate

# Rows of the operands must begin at multiples of 16 bytes; 16 elements are enough for every dtype.
_ALIGNMENT = 16


def why_not_grouped(example: LayerWeights) -> str | None:
    """None when GroupedFFN can take such weights, else the reason as part of a sentence."""
    if not hasattr(torch.nn.functional, "grouped_mm"):
        return f"torch {torch.__version__} has no grouped_mm"
    if example.hidden_size % _ALIGNMENT:
        return f"the hidden size {example.hidden_size} is not a multiple of {_ALIGNMENT}"
    if example.w13.is_cuda and example.w13.dtype is not torch.bfloat16:
        return f"on CUDA it takes bfloat16, not {example.w13.dtype}"
    return None


class GroupedFFN:
    """Two grouped matmuls over the pairs sorted by expert. Ask why_not_grouped first."""

    def __init__(self, weights: dict[int, LayerWeights]) -> None:
        """weights: emptied as it goes; they stay on their device."""
        self._layers = {layer: pad_intermediate(weights.pop(layer), _ALIGNMENT) for layer in list(weights)}

    def __call__(self, layer: int, x: Tensor, pairs: Pairs, out: Tensor | None = None) -> Tensor:
        """x, pairs and out: on the device of the weights -> [num_rows, hidden_size] float32 there.

        On CUDA nothing waits for the device here, so an expert index out of range is not found: check on the host.
        """
        weights = self._layers[layer]
        weights.check_input(x)
        if not pairs.num_pairs:
            return torch.zeros(x.shape, dtype=torch.float32, device=x.device, out=out)
        if not x.is_cuda:
            pairs.check_experts(weights.num_local_experts)
        order = torch.argsort(pairs.expert, stable=True)
        experts = torch.arange(weights.num_local_experts, device=x.device, dtype=pairs.expert.dtype)
        ends = torch.searchsorted(pairs.expert[order], experts, right=True, out_int32=True)
        gate_up = _grouped_mm(gather_rows(x, pairs)[order], weights.w13, ends)
        gate, up = gate_up.chunk(2, dim=1)
        outputs = _grouped_mm(silu(gate) * up, weights.w2, ends)
        weighted = torch.empty_like(outputs, dtype=torch.float32)
        weighted[order] = outputs.float() * pairs.weight[order].unsqueeze(1)
        y = sum_rows(weighted, pairs, x.shape[0])
        return y if out is None else out.copy_(y)


def _grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x [num_pairs, in] sorted by expert, weight [n, out, in], ends [n] int32 -> [num_pairs, out]."""
    return torch.nn.functional.grouped_mm(x, weight.transpose(1, 2), offs=ends)
