"""Expert compute with vLLM's CPU kernel for mixtures of experts, loaded as a library: vLLM itself is not imported.

The kernel takes the same number of experts for every row, and here rows have different numbers. So each
(row, expert) pair is a row of its own with one expert; the sum over a row's pairs is ours, in float32.
"""

import importlib.util
import platform
import threading
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from experts.pairs import Pairs, gather_rows, sum_rows
from experts.weights import LayerWeights, pad_intermediate

# The kernel wants both widths in multiples of this; the inner one can be padded with zeros, the hidden one not.
ALIGNMENT = 32
# The kernel keeps its scratch space per process: two calls at a time crash it.
_KERNEL_LOCK = threading.Lock()
# What we call. The kernel is an internal of vLLM: anything else than exactly this is not touched.
_SCHEMAS = {
    "cpu_fused_moe": "_C::cpu_fused_moe(Tensor(a0!) output, Tensor input, Tensor w13, Tensor w2, Tensor? w13_bias, "
    "Tensor? w2_bias, Tensor topk_weights, Tensor topk_id, bool skip_weighted, str act, str isa) -> ()",
    "prepack_moe_weight": "_C::prepack_moe_weight(Tensor weight, Tensor(a1!) packed_weight, str isa) -> ()",
}


def why_no_kernel(example: LayerWeights) -> str | None:
    """None when KernelFFN can take such weights on this machine, else the reason as part of a sentence."""
    if example.w13.device.type != "cpu":
        return f"the weights are on {example.w13.device.type}"
    if example.w13.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the kernel does not compute in {example.w13.dtype}"
    if example.hidden_size % ALIGNMENT:
        return f"the hidden size {example.hidden_size} is not a multiple of {ALIGNMENT}"
    return _load_library()


class KernelFFN:
    """Holds float32 weights of a group in the kernel's own packing. Ask why_no_kernel first.

    Weights of 16 bits need experts/compute_cpu16.py, whose sums stay float32 to the end.
    """

    def __init__(self, weights: dict[int, LayerWeights]) -> None:
        """weights: emptied as it goes; at most one layer is in memory both packed and unpacked."""
        self._layers = {layer: self._pack(weights.pop(layer)) for layer in list(weights)}

    def __call__(self, layer: int, x: Tensor, pairs: Pairs) -> Tensor:
        """x: [num_rows, hidden_size] -> [num_rows, hidden_size]."""
        packed = self._layers[layer]
        packed.check_input(x)
        if not pairs.num_pairs:
            return torch.zeros(x.shape, dtype=torch.float32)
        pairs.check_experts(packed.num_local_experts)
        inputs = gather_rows(x, pairs)
        outputs = torch.empty_like(inputs)
        fused_moe(outputs, inputs, packed.w13, packed.w2, pairs.expert, pairs.weight)
        return sum_rows(outputs, pairs, x.shape[0])

    def _pack(self, plain: LayerWeights) -> LayerWeights:
        plain = pad_intermediate(plain, ALIGNMENT)
        return LayerWeights(w13=pack(plain.w13), w2=pack(plain.w2))


def fused_moe(
    out: Tensor, x: Tensor, w13: Tensor, w2: Tensor, expert: Tensor, weight: Tensor, bias13: Tensor | None = None
) -> None:
    """One call of the kernel: out[p] = weight[p] * w2[e] (silu(gate) * up), with gate, up = w13[e] x[p] + bias13[e].

    out, x: [num_pairs, hidden_size] of one dtype. w13, w2: packed, and of the same dtype. expert: [num_pairs] int32.
    weight: [num_pairs] float32. bias13: [num_experts, 2 * width] float32.
    """
    ids, scales = expert.view(-1, 1), weight.view(-1, 1)
    with _KERNEL_LOCK:
        torch.ops._C.cpu_fused_moe(out, x, w13, w2, bias13, None, scales, ids, False, "silu", isa_of(x.dtype))


def pack(weight: Tensor) -> Tensor:
    """[num_experts, rows, columns] in the order in which the kernel reads it."""
    packed = torch.empty_like(weight)
    torch.ops._C.prepack_moe_weight(weight, packed, isa_of(weight.dtype))
    return packed


@cache
def kernel_truncates(dtype: torch.dtype) -> bool:
    """Whether vLLM's kernel cuts off the low bits of its float32 sums here, where others round to the nearest value.

    Its build for CPUs without bfloat16 instructions does that for bfloat16. Whoever adds the experts up elsewhere has
    to end as the kernel ends, or the tokens drift from those of one process. False where there is no kernel.
    """
    if dtype is torch.float32 or torch.cuda.is_available() or _load_library() is not None:
        return False
    width = ALIGNMENT
    # gate = 64 and up = 1 / 64 in every element, so the activation is 1; the sum is then the weight itself.
    w13 = torch.zeros(1, 2 * width, width)
    w13[0, :width, 0], w13[0, width:, 0] = 64.0, 1 / 64
    x, out = torch.zeros(1, width, dtype=dtype), torch.empty(1, width, dtype=dtype)
    x[0, 0] = 1.0
    above_half = torch.tensor([1 + 0.75 * torch.finfo(dtype).eps])
    identity = pack(torch.eye(width, dtype=dtype).unsqueeze(0))
    fused_moe(out, x, pack(w13.to(dtype)), identity, torch.zeros(1, dtype=torch.int32), above_half)
    return bool((out == 1.0).all())


@cache
def isa_of(dtype: torch.dtype) -> str:
    """The kernel's instruction set: tiles where the CPU has them, which multiply bfloat16 only; else vectors."""
    # The operating system grants tiles to a process that asks; without the grant they are illegal instructions.
    tiles = dtype is torch.bfloat16 and torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()
    return "amx" if tiles else "vec"


@cache
def _load_library() -> str | None:
    """Makes torch.ops._C.cpu_fused_moe available; None, or the reason why it is not."""
    if not hasattr(_ops(), "cpu_fused_moe"):  # it is there when this process has imported vLLM
        spec = importlib.util.find_spec("vllm")
        if spec is None or spec.origin is None:
            return "vLLM is not installed"
        library = Path(spec.origin).parent / f"{_library_name()}.abi3.so"
        if not library.is_file():
            return f"vLLM has no {library.name}"
        try:
            torch.ops.load_library(str(library))
        except OSError as error:
            return f"{library.name} does not load ({error})"
    for name, expected in _SCHEMAS.items():
        if not hasattr(_ops(), name):
            return f"this vLLM has no CPU kernel {name}"
        found = str(getattr(_ops(), name).default._schema)
        if found != expected:
            return f"this vLLM's CPU kernel {name} has another signature ({found})"
    return None


def _ops() -> object:
    return torch.ops._C


def _library_name() -> str:
    """The build of the kernels for this CPU; the same choice as vLLM's, of which only one build can be loaded."""
    if platform.machine().lower() in ("x86_64", "amd64", "i386", "i686"):
        if not torch.cpu._is_avx512_supported():
            return "_C_AVX2"
        if not torch.cpu._is_avx512_bf16_supported():
            return "_C_AVX512"
    return "_C"
