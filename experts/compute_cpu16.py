"""vLLM's CPU kernel for weights of 16 bits, with sums that stay float32 until the very end.

One call of the kernel in bfloat16 rounds what it returns, per pair; one process rounds only the sum over all experts
of a token. Rounding more often moves tokens: see docs/adr/0003. So a layer takes two calls:

1. the kernel in 16 bits with the identity as its second matrix: the activations, rounded as one process rounds them;
2. the kernel in float32, whose first matrix passes the activations through, with the second matrix in float32:
   exact products of the same numbers, summed in float32.
"""

import torch
from torch import Tensor

from experts.compute_cpu import ALIGNMENT, fused_moe, pack
from experts.pairs import Pairs, gather_rows, sum_rows
from experts.weights import LayerWeights, pad_intermediate

_GATE = 64.0  # silu(64) is 64 to the last bit of float32, and a power of two scales without rounding


class KernelFFN16:
    """Holds bfloat16 or float16 weights of a group: w13 as it is, w2 in float32. Ask why_no_kernel first."""

    def __init__(self, weights: dict[int, LayerWeights]) -> None:
        """weights: emptied as it goes; at most one layer is in memory both packed and unpacked."""
        example = next(iter(weights.values()))
        num_experts, dtype = example.num_local_experts, example.w13.dtype
        width = pad_intermediate(example, ALIGNMENT).intermediate_size
        # The same for every layer: the identity, and a first matrix whose gate is constant and whose up is x.
        self._identity = pack(torch.eye(width, dtype=dtype).repeat(num_experts, 1, 1))
        self._pass = pack(torch.cat([torch.zeros(width, width), torch.eye(width)]).repeat(num_experts, 1, 1))
        self._pass_bias = torch.cat([torch.full((width,), _GATE), torch.zeros(width)]).repeat(num_experts, 1)
        self._width = width
        self._layers = {layer: self._pack(weights.pop(layer)) for layer in list(weights)}

    def __call__(self, layer: int, x: Tensor, pairs: Pairs) -> Tensor:
        """x: [num_rows, hidden_size] 16 bits -> [num_rows, hidden_size] float32."""
        packed = self._layers[layer]
        packed.check_input(x)
        if not pairs.num_pairs:
            return torch.zeros(x.shape, dtype=torch.float32)
        pairs.check_experts(packed.num_local_experts)
        inputs = gather_rows(x, pairs)
        activations = torch.empty(len(inputs), self._width, dtype=x.dtype)
        fused_moe(activations, inputs, packed.w13, self._identity, pairs.expert, torch.ones_like(pairs.weight))
        outputs = torch.empty(inputs.shape, dtype=torch.float32)
        weight = pairs.weight / _GATE
        fused_moe(outputs, activations.float(), self._pass, packed.w2, pairs.expert, weight, self._pass_bias)
        return sum_rows(outputs, pairs, x.shape[0])

    def _pack(self, plain: LayerWeights) -> LayerWeights:
        plain = pad_intermediate(plain, ALIGNMENT)
        return LayerWeights(w13=pack(plain.w13), w2=pack(plain.w2.float()))
