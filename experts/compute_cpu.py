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
_ALIGNMENT = 32
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
    if example.hidden_size % _ALIGNMENT:
        return f"the hidden size {example.hidden_size} is not a multiple of {_ALIGNMENT}"
    return _load_library()


class KernelFFN:
    """Holds the weights of a group in the kernel's own packing. Ask why_no_kernel first."""

    def __init__(self, weights: dict[int, LayerWeights]) -> None:
        """weights: emptied as it goes; at most one layer is in memory both packed and unpacked."""
        self._isa = _isa(next(iter(weights.values())).w13.dtype)
        self._layers = {layer: self._pack(weights.pop(layer)) for layer in list(weights)}

    def __call__(self, layer: int, x: Tensor, pairs: Pairs) -> Tensor:
        """x: [num_rows, hidden_size] -> [num_rows, hidden_size] float32; each pair is rounded to the dtype of x."""
        packed = self._layers[layer]
        packed.check_input(x)
        if not pairs.num_pairs:
            return torch.zeros(x.shape, dtype=torch.float32)
        pairs.check_experts(packed.num_local_experts)
        inputs = gather_rows(x, pairs)
        outputs = torch.empty_like(inputs)
        ids, scales = pairs.expert.view(-1, 1), pairs.weight.view(-1, 1)
        with _KERNEL_LOCK:
            torch.ops._C.cpu_fused_moe(
                outputs, inputs, packed.w13, packed.w2, None, None, scales, ids, False, "silu", self._isa
            )
        return sum_rows(outputs, pairs, x.shape[0])

    def _pack(self, plain: LayerWeights) -> LayerWeights:
        plain = pad_intermediate(plain, _ALIGNMENT)
        return LayerWeights(w13=self._pack_one(plain.w13), w2=self._pack_one(plain.w2))

    def _pack_one(self, weight: Tensor) -> Tensor:
        packed = torch.empty_like(weight)
        torch.ops._C.prepack_moe_weight(weight, packed, self._isa)
        return packed


def _isa(dtype: torch.dtype) -> str:
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
