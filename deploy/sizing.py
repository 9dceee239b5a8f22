"""How large the pods of a deployment are, and how many: arithmetic on its config and on the model's config.json.

Nothing is opened and no machine is asked. docs/sizing.md has the numbers for three models; deploy/sizing_page.py
writes it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from deploy.model_size import ModelSize, group_counts, itemsize
from experts.errors import ConfigError
from experts.wire import Limits

if TYPE_CHECKING:
    from deploy.config import DeploymentConfig

MIB, GIB = 1 << 20, 1 << 30

# Host memory, as measured on small checkpoints, whose weights are next to nothing.
PROCESS_BYTES = 350 * MIB  # a router or an expert replica
ENGINE_BYTES = 1400 * MIB  # an attention replica with its engine
RAY_BYTES = 1500 * MIB  # Ray's own processes of a node, a gateway and the controller
CUDA_BYTES = 3 * GIB  # what CUDA's libraries add to a process that uses a GPU

SHM_BYTES = 512 * MIB  # /dev/shm; half of it is Ray's object store, through which little goes here
MARGIN = 1.2  # a pod's memory, over the sum of what is known: allocators keep what they once had
ROUND_BYTES = 256 * MIB
GPU_SHARE = 0.9  # of a GPU's memory; the rest is for CUDA's context, kernels and fragmentation
GPU_MEMORY_GIB = 80.0
CONTROLLER_CPUS = 0.1

# vLLM: latent attention brings the context of a chunk back to full width, so many tokens at a time.
CONTEXT_TOKENS = 64 << 10
KV_BLOCK_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class PodSize:
    """One worker group: how many pods, and what one of them asks for."""

    replicas: int
    max_replicas: int  # with the pods that replacements need while the old ones still serve
    cpus: float
    memory_bytes: int  # of the host, /dev/shm and everything in it included
    gpus: int
    shm_bytes: int
    weights_bytes: int  # of the model, on the GPU where there is one

    @property
    def object_store_bytes(self) -> int:
        """What Ray is to be told; its own choice, 30 % of the memory, would not fit into /dev/shm."""
        return self.shm_bytes // 2


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceUse:
    """What a replica needs on its device, a GPU or the host."""

    weights_bytes: int
    work_bytes: int  # the largest step that the config allows

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.work_bytes

    def left_bytes(self, gpu_memory_gib: float) -> int:
        """Of the share of a GPU that may be used; negative where it is too small."""
        return int(gpu_memory_gib * GIB * GPU_SHARE) - self.total_bytes

    @property
    def smallest_gpu_gib(self) -> float:
        return self.total_bytes / GPU_SHARE / GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizing:
    """A config and a model, and what follows from the two."""

    config: "DeploymentConfig"
    size: ModelSize
    dtype: str
    gpu_memory_gib: float

    @classmethod
    def of(
        cls, config: "DeploymentConfig", model: Mapping[str, object], *, gpu_memory_gib: float = GPU_MEMORY_GIB
    ) -> Self:
        """model: the content of config.json. Raises ConfigError where the two do not fit together."""
        size = ModelSize.of(model)
        size.shape.check_num_groups(config.experts.groups)
        dtype = config.model.dtype if config.model.dtype != "auto" else size.dtype
        if dtype is None:
            raise ConfigError("config.json names no dtype, and model.dtype is auto: set model.dtype")
        itemsize(dtype)
        if size.context is not None and config.model.max_model_len > size.context:
            raise ConfigError(
                f"model.max_model_len is {config.model.max_model_len}, and the model's context is {size.context}: "
                "lower it"
            )
        return cls(config=config, size=size, dtype=dtype, gpu_memory_gib=gpu_memory_gib)

    @property
    def frame_bytes(self) -> int:
        """The largest message of the data plane; every link has a buffer of this size."""
        return Limits.of(self.size.shape, max_rows=self.config.max_rows).max_payload_bytes

    @property
    def kv_cache_bytes(self) -> int:
        return self.config.attention.kv_cache_mib * MIB

    @property
    def experts_on_gpu(self) -> bool:
        return self.config.experts.num_gpus > 0

    @property
    def attention_on_gpu(self) -> bool:
        return self.config.attention.num_gpus > 0

    @property
    def experts(self) -> DeviceUse:
        """One copy of one group. A batch joins the rows of all engines, and a row may want all its experts here."""
        shape, b = self.size.shape, itemsize(self.dtype)
        weights = self.size.group_bytes(self.config.experts.groups, self.dtype)
        rows = self.config.max_rows * self.config.attention.most_replicas
        pairs = rows * min(shape.top_k, shape.num_experts // self.config.experts.groups)
        per_pair = shape.hidden_size * (3 * b + 12) + shape.moe_intermediate_size * 4 * b  # 12: three in float32
        return DeviceUse(weights_bytes=weights, work_bytes=pairs * per_pair + rows * shape.hidden_size * (b + 4))

    @property
    def expert_layer_bytes(self) -> int:
        """The home experts of a group in one layer."""
        return self.experts.weights_bytes // len(self.size.shape.moe_layers)

    @property
    def attention(self) -> DeviceUse:
        """One engine without its KV cache."""
        size, layer, b = self.size, self.size.attention_shape, itemsize(self.dtype)
        per_head = 2 * layer.qk_head_dim + layer.kv_head_dim + layer.v_head_dim  # queries, keys, values, outputs
        per_row = b * (4 * size.shape.hidden_size + layer.num_heads * per_head + 3 * size.mlp_width)
        logits = self.config.attention.max_num_seqs * size.vocab_size * 4 * 3  # float32: logits, sorted, probabilities
        work = self.config.max_rows * per_row + logits + self._context_bytes
        return DeviceUse(weights_bytes=size.rest_bytes(self.dtype), work_bytes=work)

    @property
    def _context_bytes(self) -> int:
        """Keys and values of a long prompt's earlier chunks, at full width; on a CPU prompts have no chunks."""
        layer, attention = self.size.attention_shape, self.config.attention
        if not (layer.is_latent and self.attention_on_gpu):
            return 0
        wanted = max(8 * self.config.model.max_model_len, 4 * attention.max_num_seqs * KV_BLOCK_TOKENS)
        per_token = layer.num_heads * (layer.kv_head_dim + layer.qk_head_dim) + layer.kv_values
        return min(wanted, CONTEXT_TOKENS) * per_token * itemsize(self.dtype)

    @property
    def kv_room_bytes(self) -> int:
        """What a KV cache may have on an attention GPU; negative where nothing is left."""
        return self.attention.left_bytes(self.gpu_memory_gib)

    def kv_tokens(self, num_bytes: int) -> int:
        return max(num_bytes, 0) // self.size.kv_bytes_per_token(self.dtype)


def pod_sizes(
    config: "DeploymentConfig", model: Mapping[str, object], *, gpu_memory_gib: float = GPU_MEMORY_GIB
) -> Mapping[str, PodSize]:
    """The worker groups of a cluster: `gateway`, `attention` and `experts`, with one replica in a pod.

    model: the content of the checkpoint's config.json. gpu_memory_gib: memory of one GPU.
    Raises ConfigError with the numbers where something does not fit.
    """
    sizing = Sizing.of(config, model, gpu_memory_gib=gpu_memory_gib)
    _check_attention(sizing)
    _check_experts(sizing)
    return {"gateway": _gateway_pod(sizing), "attention": _attention_pod(sizing), "experts": _experts_pod(sizing)}


def _gateway_pod(sizing: Sizing) -> PodSize:
    """The controller is in one of them. A request's body is there as long as it is open."""
    gateway = sizing.config.gateway
    bodies = gateway.max_open_requests * gateway.max_body_bytes
    return PodSize(
        replicas=gateway.replicas,
        max_replicas=2 * gateway.replicas,
        cpus=_whole_cpus(gateway.num_cpus + CONTROLLER_CPUS),
        memory_bytes=_with_margin(RAY_BYTES + bodies),
        gpus=0,
        shm_bytes=SHM_BYTES,
        weights_bytes=0,
    )


def _attention_pod(sizing: Sizing) -> PodSize:
    """An engine and its router, which has a link to the engine and to every copy of every group."""
    config, use = sizing.config, sizing.attention
    links = config.experts.groups * config.expert_copies[1] + 2
    host = RAY_BYTES + ENGINE_BYTES + PROCESS_BYTES + links * sizing.frame_bytes
    # The engine reads its weights tensor by tensor, so on a GPU they are never in the host's memory together.
    host += CUDA_BYTES if sizing.attention_on_gpu else use.total_bytes + sizing.kv_cache_bytes
    attention, most = config.attention, config.attention.most_replicas
    surge = 0 if sizing.attention_on_gpu else max(most, config.router.replicas)
    return PodSize(
        replicas=max(attention.replicas, config.router.replicas),
        max_replicas=max(most, config.router.replicas) + surge,
        cpus=_whole_cpus(max(attention.num_cpus, attention.threads) + config.router.num_cpus),
        memory_bytes=_with_margin(host),
        gpus=int(sizing.attention_on_gpu),
        shm_bytes=SHM_BYTES,
        weights_bytes=use.weights_bytes,
    )


def _experts_pod(sizing: Sizing) -> PodSize:
    config, use = sizing.config, sizing.experts
    links = 2 * config.router.replicas  # rows that come in, sums that go out
    host = RAY_BYTES + PROCESS_BYTES + links * sizing.frame_bytes
    # Weights go to the GPU layer by layer; of the layer that is being read the host has two copies at most.
    host += CUDA_BYTES + 2 * sizing.expert_layer_bytes if sizing.experts_on_gpu else use.total_bytes
    least, most = config.expert_copies
    surge = 0 if sizing.experts_on_gpu else most
    return PodSize(
        replicas=config.experts.groups * least,
        max_replicas=config.experts.groups * most + surge,
        cpus=_whole_cpus(max(config.experts.num_cpus, config.experts.threads)),
        memory_bytes=_with_margin(host),
        gpus=int(sizing.experts_on_gpu),
        shm_bytes=SHM_BYTES,
        weights_bytes=use.weights_bytes,
    )


def _check_attention(sizing: Sizing) -> None:
    config = sizing.config
    if config.router.replicas < config.attention.most_replicas:
        raise ConfigError(
            f"router.replicas is {config.router.replicas}, and there may be {config.attention.most_replicas} attention "
            "pods, each of which needs a router of its own: raise router.replicas"
        )
    if not sizing.attention_on_gpu:
        return
    _check_one_gpu("attention", config.attention.num_gpus)
    use, room = sizing.attention, sizing.kv_room_bytes
    if room < sizing.kv_cache_bytes:
        raise ConfigError(
            f"an attention GPU needs {_gib(use.weights_bytes)} for weights, {_gib(use.work_bytes)} to work and "
            f"{_gib(sizing.kv_cache_bytes)} for its KV cache, and {_gib(use.total_bytes + room)} of "
            f"{sizing.gpu_memory_gib:g} GiB may be used: "
            + (
                f"set attention.kv_cache_mib to at most {room // MIB}"
                if room >= MIB
                else "lower model.max_model_len or attention.max_num_seqs, or use GPUs with more memory"
            )
        )


def _check_experts(sizing: Sizing) -> None:
    experts, use = sizing.config.experts, sizing.experts
    if not sizing.experts_on_gpu:
        cpus = _whole_cpus(max(experts.num_cpus, experts.threads))
        if 2 * experts.num_cpus <= cpus:
            raise ConfigError(
                f"experts.num_cpus is {experts.num_cpus:g}, and an expert pod has {cpus:g} CPUs, so that two replicas "
                f"would share a pod whose memory is for one: set experts.num_cpus to {cpus:g}"
            )
        return
    _check_one_gpu("experts", experts.num_gpus)
    if use.left_bytes(sizing.gpu_memory_gib) < 0:
        usable = sizing.gpu_memory_gib * GPU_SHARE
        larger = [d for d in group_counts(sizing.size.shape) if d > experts.groups]
        split = f"raise experts.groups (now {experts.groups}) to {larger[0]}, " if larger else ""
        raise ConfigError(
            f"an expert group needs {_gib(use.weights_bytes)} for weights and {_gib(use.work_bytes)} to work, and "
            f"{usable:.1f} GiB of a GPU's {sizing.gpu_memory_gib:g} GiB may be used: {split}lower "
            f"model.max_model_len, or use GPUs of at least {math.ceil(use.smallest_gpu_gib)} GiB"
        )


def _check_one_gpu(section: str, num_gpus: float) -> None:
    if not 0.5 < num_gpus <= 1:
        raise ConfigError(
            f"{section}.num_gpus is {num_gpus:g}, and a replica computes on one GPU, which is its own: set it to 1"
        )


def _whole_cpus(cpus: float) -> float:
    """Ray counts a pod's CPUs in whole ones."""
    return float(max(math.ceil(cpus), 1))


def _with_margin(known_bytes: int) -> int:
    return math.ceil((known_bytes * MARGIN + SHM_BYTES) / ROUND_BYTES) * ROUND_BYTES


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB"
