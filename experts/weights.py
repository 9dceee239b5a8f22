"""The weights of the experts that one group holds, read from safetensors: only these tensors, layer by layer."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from experts.checkpoint import Checkpoint, ExpertKey, bias_name, open_checkpoint
from experts.errors import ConfigError

__all__ = [
    "Checkpoint",
    "LayerWeights",
    "bytes_needed",
    "load_group",
    "open_checkpoint",
    "pad_intermediate",
    "read_bias",
    "read_experts",
]

Progress = Callable[[int, int], None]  # (bytes done, bytes in all), in the dtype that is loaded


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """The matrices of `n` experts of one layer, in the order in which they were asked for."""

    w13: Tensor  # [n, 2 * moe_intermediate_size, hidden_size]: gate above up
    w2: Tensor  # [n, hidden_size, moe_intermediate_size]: down

    @property
    def num_local_experts(self) -> int:
        return self.w13.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.w13.shape[2]

    @property
    def intermediate_size(self) -> int:
        return self.w2.shape[2]

    @property
    def size_bytes(self) -> int:
        return self.w13.nbytes + self.w2.nbytes

    def to(self, device: torch.device) -> "LayerWeights":
        return LayerWeights(w13=self.w13.to(device), w2=self.w2.to(device))

    def check_input(self, x: Tensor) -> None:
        """Raises ValueError unless x is [any, hidden_size] in the dtype of the weights."""
        check_rows(x, hidden_size=self.hidden_size, dtype=self.w13.dtype)


def check_rows(x: Tensor, *, hidden_size: int, dtype: torch.dtype) -> None:
    """Raises ValueError unless x is [any, hidden_size] of this dtype."""
    if x.ndim != 2 or x.shape[1] != hidden_size or x.dtype != dtype:
        raise ValueError(f"x is {list(x.shape)} {x.dtype}; {hidden_size=} and {dtype=}")


def read_experts(checkpoint: Checkpoint, experts: Sequence[int], layer: int, dtype: torch.dtype) -> LayerWeights:
    """Reads some experts of one layer.

    experts: global ids, in the order in which they will stand in the result.
    dtype: bfloat16, float16 or float32; what is on disk is converted.
    Raises ConfigError when a file is gone or broken since the checkpoint was opened.
    """
    shape = checkpoint.shape
    inner, hidden = shape.moe_intermediate_size, shape.hidden_size
    w13 = torch.empty(len(experts), 2 * inner, hidden, dtype=dtype)
    w2 = torch.empty(len(experts), hidden, inner, dtype=dtype)
    targets: dict[str, Tensor] = {}
    for local, expert in enumerate(experts):
        targets[checkpoint.expert_names[ExpertKey(layer, expert, "gate")]] = w13[local, :inner]
        targets[checkpoint.expert_names[ExpertKey(layer, expert, "up")]] = w13[local, inner:]
        targets[checkpoint.expert_names[ExpertKey(layer, expert, "down")]] = w2[local]
    for name, tensor in _read_tensors(checkpoint, list(targets)):
        targets[name].copy_(tensor)
    return LayerWeights(w13=w13, w2=w2)


def load_group(
    checkpoint: Checkpoint,
    experts: Sequence[int],
    dtype: torch.dtype,
    on_progress: Progress | None = None,
    device: torch.device | None = None,
) -> dict[int, LayerWeights]:
    """Reads the experts of one group in every MoE layer: layer -> LayerWeights. Raises as read_experts does.

    device: where each layer goes before the next one is read, so that the host has room for one only; None: the host.
    """
    total = bytes_needed(checkpoint, len(experts), dtype)
    loaded: dict[int, LayerWeights] = {}
    done = 0
    for layer in checkpoint.shape.moe_layers:
        weights = read_experts(checkpoint, experts, layer, dtype)
        loaded[layer] = weights if device is None else weights.to(device)
        done += loaded[layer].size_bytes
        if on_progress is not None:
            on_progress(done, total)
    return loaded


def read_bias(checkpoint: Checkpoint, layer: int) -> Tensor | None:
    """The selection bias of a layer, float32 [num_experts]; None where the checkpoint has none."""
    name = bias_name(checkpoint.layer_homes[layer])
    if name not in checkpoint.tensors:
        return None
    ((_, bias),) = _read_tensors(checkpoint, [name])
    return bias.to(torch.float32)


def bytes_needed(checkpoint: Checkpoint, num_experts_held: int, dtype: torch.dtype) -> int:
    """Bytes of the weights of `num_experts_held` experts of every MoE layer, in `dtype`, without any working memory."""
    shape = checkpoint.shape
    per_expert = 3 * shape.hidden_size * shape.moe_intermediate_size * dtype.itemsize
    return len(shape.moe_layers) * num_experts_held * per_expert


def pad_intermediate(weights: LayerWeights, multiple: int) -> LayerWeights:
    """The same experts with their inner width filled up with zeros, which adds nothing to any output."""
    inner = weights.intermediate_size
    missing = -inner % multiple
    if not missing:
        return weights
    n, _, hidden = weights.w13.shape
    gate_up = torch.nn.functional.pad(weights.w13.view(n, 2, inner, hidden), (0, 0, 0, missing))
    down = torch.nn.functional.pad(weights.w2, (0, missing))
    return LayerWeights(w13=gate_up.view(n, 2 * (inner + missing), hidden), w2=down)


def _read_tensors(checkpoint: Checkpoint, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Reads the named tensors, each file opened once; pages of other tensors are never touched."""
    by_file: dict[Path, list[str]] = defaultdict(list)
    for name in names:
        by_file[checkpoint.tensors[name].file].append(name)
    for file, wanted in by_file.items():
        try:
            with safe_open(file, framework="pt") as shard:
                for name in wanted:
                    yield name, shard.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{file} could not be read ({error}); it has changed since the start") from error
