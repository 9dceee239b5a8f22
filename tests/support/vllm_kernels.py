"""vLLM's CPU kernels in a process that does not import vLLM, to compare with."""

import importlib.util
from pathlib import Path

import torch
from torch import Tensor


def load_vllm_kernels() -> bool:
    """Makes torch.ops._C available. False where there is no such library for this CPU."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None or torch.cuda.is_available():
        return False
    name = "_C_AVX2"
    if torch.cpu._is_avx512_supported():
        name = "_C" if torch.cpu._is_avx512_bf16_supported() else "_C_AVX512"  # as vLLM chooses
    library = Path(spec.origin).parent / f"{name}.abi3.so"
    if library.is_file():
        torch.ops.load_library(str(library))
    return hasattr(torch.ops._C, "cpu_fused_moe")


def fused_moe(x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """[num_rows, hidden] like x: what one vLLM process computes. weights, experts: [num_rows, top_k]."""
    out = torch.empty_like(x)
    packed = []
    for matrix in (w13, w2):
        packed.append(torch.empty_like(matrix))
        torch.ops._C.prepack_moe_weight(matrix, packed[-1], "vec")
    torch.ops._C.cpu_fused_moe(out, x, *packed, None, None, weights, experts, False, "silu", "vec")
    return out
