"""The fast path of router/gate: the same experts for the same logits, compiled, straight from a received frame.

Compiled code cannot repeat torch's exp bit by bit, and scores tie where logits nearly do.
So a token is decided here only if its choice is clear by more than all rounding errors together, or turns on logits
that are exactly equal, which torch.topk settles in a way that can be repeated (and is checked against it at start).
Any other token, and one with a NaN or an infinity, is left to the plain twin.
Experts therefore always equal the twin's; weights agree within 1e-6 relative.
"""

import functools
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from experts.compiled import compiled
from experts.shape import MoEShape
from router.gate import check_arguments, route
from router.gate_kernels import PLAIN, SIGMOID, SOFTMAX, route_rows

# Low bits of a float32 weight that vanish when vLLM rounds it to the logits' dtype.
_ROUNDED_BITS = {np.dtype(np.float32): 0, np.dtype(np.float16): 13, np.dtype(np.uint16): 16}


class RoutingArrays(NamedTuple):
    """Routing as numpy arrays; freshly allocated, owned by the caller."""

    topk_idx: NDArray[np.int32]  # [num_tokens, top_k] global expert ids, distinct and ascending within a token
    topk_weights: NDArray[np.float32]  # [num_tokens, top_k] aligned with topk_idx


def route_fast(
    logits: NDArray[np.generic], shape: MoEShape, *, bias: NDArray[np.float32] | None = None, scale: float = 1.0
) -> RoutingArrays:
    """The experts that each token visits; route() on the same numbers, as sets always and in weights within 1e-6.

    logits: [num_tokens, num_experts], float32, float16, or bfloat16 as uint16 bit patterns; any alignment, read-only
    or not, never written to. bias, scale, NaN and errors are as in route(). Releases the GIL while it computes.
    """
    bias_shape = None if bias is None else bias.shape
    check_arguments(logits.shape, shape, bias_shape=bias_shape, scale=scale)
    values = _widen(logits)
    raw_softmax = not shape.grouped and not shape.norm_topk_prob
    if raw_softmax or (shape.uses_bias and shape.scoring == "softmax"):
        # The first takes a logsumexp that rounds at every step, the second no checkpoint uses: not worth repeating.
        return _ask_twin(logits, shape, bias, scale)
    routing, unclear = _compute(values, logits.dtype, shape, bias, scale, settle_ties=_torch_settles_ties_as_we_do())
    if unclear is None:
        return routing
    if shape.grouped and shape.scoring == "sigmoid":
        # torch's sigmoid rounds differently in the odd elements at the end of a batch: ask about the same batch.
        whole = _ask_twin(logits, shape, bias, scale)
        answer = RoutingArrays(whole.topk_idx[unclear], whole.topk_weights[unclear])
    else:
        answer = _ask_twin(logits[unclear], shape, bias, scale)
    routing.topk_idx[unclear] = answer.topk_idx
    routing.topk_weights[unclear] = answer.topk_weights
    return routing


def warm_up(shape: MoEShape) -> None:
    """Compiles what route_fast needs, or reads it from the cache, so that no request pays for it.

    Takes 5 to 12 s the first time, half a second after that; one warm-up serves every shape.
    """
    bias = np.zeros(shape.num_experts, np.float32) if shape.uses_bias else None
    for dtype in (np.float32, np.float16, np.uint16):
        route_fast(np.zeros((2, shape.num_experts), dtype), shape, bias=bias)


def _compute(
    values: NDArray[np.float32],
    dtype: np.dtype[np.generic],
    shape: MoEShape,
    bias: NDArray[np.float32] | None,
    scale: float,
    *,
    settle_ties: bool,
) -> tuple[RoutingArrays, NDArray[np.bool_] | None]:
    """The routing of `values`, and which rows of it are not certain (None if all are)."""
    routing = RoutingArrays(
        np.empty((len(values), shape.top_k), np.int32), np.empty((len(values), shape.top_k), np.float32)
    )
    unclear = np.empty(len(values), np.bool_)
    num_unclear = compiled(route_rows)(
        values,
        _no_bias(shape.num_experts) if bias is None else _frozen(np.require(bias, np.float32, ["C", "A"])),
        bias is not None,
        PLAIN if not shape.grouped else SOFTMAX if shape.scoring == "softmax" else SIGMOID,
        shape.num_model_groups,
        shape.topk_group,
        shape.norm_topk_prob,
        0 if shape.grouped else _ROUNDED_BITS[dtype],
        np.float32(scale),
        settle_ties,
        routing.topk_idx,
        routing.topk_weights,
        unclear,
    )
    return routing, unclear if num_unclear else None


@functools.cache
def _torch_settles_ties_as_we_do() -> bool:
    """Tries torch.topk on rows full of ties: another C++ library under torch may settle them its own way."""
    rng = np.random.default_rng(0)
    for num_experts, top_k, num_groups, topk_group in ((8, 2, 1, 1), (128, 8, 1, 1), (64, 6, 8, 3), (160, 6, 8, 3)):
        shape = MoEShape(
            moe_layers=(0,),
            hidden_size=1,
            moe_intermediate_size=1,
            num_experts=num_experts,
            top_k=top_k,
            num_model_groups=num_groups,
            topk_group=topk_group,
            norm_topk_prob=True,
            grouped=num_groups > 1,
        )
        logits = rng.integers(0, 6, (32, num_experts)).astype(np.float32)
        routing, unclear = _compute(_frozen(logits), logits.dtype, shape, None, 1.0, settle_ties=True)
        settled = slice(None) if unclear is None else ~unclear
        if not np.array_equal(routing.topk_idx[settled], _ask_twin(logits, shape, None, 1.0).topk_idx[settled]):
            return False
    return True


def _widen(logits: NDArray[np.generic]) -> NDArray[np.float32]:
    """Logits as contiguous, aligned, read-only float32: one array type, hence one compiled version."""
    if logits.dtype == np.uint16:
        bits = logits.astype(np.uint32)
        bits <<= 16
        return _frozen(bits.view(np.float32))
    if logits.dtype not in (np.float32, np.float16):
        raise ValueError(f"{logits.dtype=} must be float32, float16, or uint16 for bfloat16 bits")
    return _frozen(np.require(logits, np.float32, ["C", "A"]))


def _frozen(array: NDArray[np.float32]) -> NDArray[np.float32]:
    array = array.view()
    array.flags.writeable = False
    return array


@functools.cache
def _no_bias(num_experts: int) -> NDArray[np.float32]:
    return _frozen(np.zeros(num_experts, np.float32))


def _ask_twin(
    logits: NDArray[np.generic], shape: MoEShape, bias: NDArray[np.float32] | None, scale: float
) -> RoutingArrays:
    # Copied, because torch warns of memory that it may not write to.
    tensor = torch.from_numpy(np.array(logits.view(np.int16) if logits.dtype == np.uint16 else logits))
    if logits.dtype == np.uint16:
        tensor = tensor.view(torch.bfloat16)
    routing = route(tensor, shape, bias=None if bias is None else torch.from_numpy(np.array(bias)), scale=scale)
    return RoutingArrays(routing.topk_idx.numpy(), routing.topk_weights.numpy())
