"""How vLLM's CPU kernel for mixtures of experts ends its sums on this machine: the answers of ours must end alike."""

from functools import cache

import torch

_WIDTH = 32  # a multiple of what the kernel wants
_ISA = "vec"  # vectors; with tiles of bfloat16 the kernel rounds as everybody does


@cache
def kernel_truncates(dtype: torch.dtype) -> bool:
    """Whether vLLM's kernel cuts off the low bits of its float32 sums here, where others round to the nearest value.

    Its build for CPUs without bfloat16 instructions does that for bfloat16. Whoever adds the experts up elsewhere has
    to end as the kernel ends, or the tokens drift from those of one process. False where there is no such kernel: call
    it in a process that has imported vLLM.
    """
    kernel = getattr(torch.ops._C, "cpu_fused_moe", None)
    if dtype is torch.float32 or torch.cuda.is_available() or kernel is None:
        return False
    # gate = 64 and up = 1 / 64 in every element, so the activation is 1; the sum is then the weight itself.
    w13 = torch.zeros(1, 2 * _WIDTH, _WIDTH)
    w13[0, :_WIDTH, 0], w13[0, _WIDTH:, 0] = 64.0, 1 / 64
    x, out = torch.zeros(1, _WIDTH, dtype=dtype), torch.empty(1, _WIDTH, dtype=dtype)
    x[0, 0] = 1.0
    above_half = torch.tensor([[1 + 0.75 * torch.finfo(dtype).eps]])
    matrices = [_pack(matrix.to(dtype)) for matrix in (w13, torch.eye(_WIDTH).unsqueeze(0))]
    expert = torch.zeros(1, 1, dtype=torch.int32)
    kernel(out, x, *matrices, None, None, above_half, expert, False, "silu", _ISA)
    return bool((out == 1.0).all())


def _pack(weight: torch.Tensor) -> torch.Tensor:
    packed = torch.empty_like(weight)
    torch.ops._C.prepack_moe_weight(weight, packed, _ISA)
    return packed
