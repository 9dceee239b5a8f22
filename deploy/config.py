"""The config file of a deployment, and what is refused before anything of it starts."""

import difflib
import errno
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import yaml
from pydantic import Field, ValidationError

from cluster.autoscale_config import AutoscaleConfig
from cluster.config import AttentionConfig, GatewayConfig
from cluster.exporter import MetricsConfig
from cluster.keys import Keys
from cluster.traces_config import TracesConfig
from deploy.sizing import ENGINE_BYTES, PROCESS_BYTES, RAY_BYTES
from experts.checkpoint import Checkpoint, open_checkpoint
from experts.config import ExpertsConfig, ModelConfig, Settings
from experts.errors import ConfigError
from experts.weights import bytes_needed
from experts.wire import Limits
from router.config import RouterConfig

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "laptop.yaml"
EMBEDDED = Path(__file__).parent / "nano"  # the checkpoint that comes with the package
MAX_FRAME_BYTES = 1 << 30  # every link keeps a buffer for the largest message
CPU_KV_LORA_RANK, CPU_ROPE_HEAD_DIM = 512, 64  # the only shape of vLLM's CPU_MLA backend


class PlacementConfig(Settings):
    """Labels that a Ray node must have for a part to run there; none: any node."""

    controller: dict[str, str] = Field(default={})
    gateway: dict[str, str] = Field(default={})
    router: dict[str, str] = Field(default={})  # where the attention replicas are: each asks the router of its own node
    attention: dict[str, str] = Field(default={})
    experts: dict[str, str] = Field(default={})


class DeploymentConfig(Settings):
    """A whole config file; every section may be left out."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    gateway: GatewayConfig = Field(default_factory=GatewayConfig)
    attention: AttentionConfig = Field(default_factory=AttentionConfig)
    router: RouterConfig = Field(default_factory=RouterConfig)
    experts: ExpertsConfig = Field(default_factory=ExpertsConfig)
    autoscale: AutoscaleConfig = Field(default_factory=AutoscaleConfig)
    metrics: MetricsConfig = Field(default_factory=MetricsConfig)
    traces: TracesConfig = Field(default_factory=TracesConfig)
    placement: PlacementConfig = Field(default_factory=PlacementConfig)

    @property
    def expert_copies(self) -> tuple[int, int]:
        """Copies of each expert group, at least and at most."""
        scale, fixed = self.autoscale, self.experts.replicas
        return (scale.min_replicas, scale.max_replicas) if scale.enabled else (fixed, fixed)

    @property
    def max_rows(self) -> int:
        """Tokens of one step at most: without chunked prefill a whole prompt is one step."""
        attention = self.attention
        return max(self.model.max_model_len, attention.max_num_seqs, attention.max_num_batched_tokens or 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """A config whose checkpoint has been found and checked."""

    config: DeploymentConfig
    checkpoint: Checkpoint
    served_name: str
    dtype: str  # float32, bfloat16 or float16

    @property
    def max_rows(self) -> int:
        return self.config.max_rows


def load(path: str | Path, overrides: Mapping[str, object] | None = None) -> DeploymentConfig:
    """Reads a config file. overrides: values by dotted name, such as `experts.groups`, which win over the file.

    Raises ConfigError that names the key, and the nearest known one where a key is unknown.
    """
    file = Path(path)
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError(f"cannot read the config file {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not YAML: {str(error).replace(chr(10), ' ')}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file} must hold sections ({', '.join(DeploymentConfig.model_fields)}), not {content!r}")
    content = {section: {} if given is None else given for section, given in content.items()}
    for name, value in (overrides or {}).items():
        section, _, key = name.partition(".")
        given = content.get(section, {})
        if not isinstance(given, dict):
            raise ConfigError(f"{file}: {section} is {given!r}, and must hold keys with their values")
        content[section] = {**given, key: value}
    try:
        return DeploymentConfig.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{file}: {_first_problem(error)}") from None


def resolve(config: DeploymentConfig) -> Resolved:
    """Opens the checkpoint and refuses what could not be served. Raises ConfigError."""
    named = config.model.checkpoint
    folder = EMBEDDED if named == "embedded" else Path(named)
    checkpoint = open_checkpoint(folder.absolute())
    if config.autoscale.enabled and config.experts.replicas != 1:
        raise ConfigError(
            f"experts.replicas is {config.experts.replicas}, and autoscale allows {config.autoscale.min_replicas} to "
            f"{config.autoscale.max_replicas} copies of each group: leave out one of the two"
        )
    dtype = config.model.dtype
    if dtype == "auto":
        dtype = str(checkpoint.dtype).removeprefix("torch.")
    checkpoint.shape.check_num_groups(config.experts.groups)
    _check_lengths(config, checkpoint)
    if not (config.attention.num_gpus or torch.cuda.is_available()):
        _check_cpu_attention(checkpoint.config)
    name = config.model.served_name or ("expertmesh-nano" if named == "embedded" else folder.absolute().name)
    return Resolved(config=config, checkpoint=checkpoint, served_name=name, dtype=dtype)


def pinned(resolved: Resolved) -> DeploymentConfig:
    """The config with what was found out in the place of `embedded` and `auto`: it means the same everywhere."""
    model = resolved.config.model.model_copy(
        update={
            "checkpoint": str(resolved.checkpoint.path),
            "served_name": resolved.served_name,
            "dtype": resolved.dtype,
        }
    )
    return resolved.config.model_copy(update={"model": model})


def check_machine(resolved: Resolved) -> None:
    """Refuses to start where a port is taken, keys are missing, or this machine's memory is too small.

    Raises ConfigError.
    """
    gateway = resolved.config.gateway
    if gateway.http_port == gateway.grpc_port:
        raise ConfigError(f"gateway.http_port and gateway.grpc_port are both {gateway.http_port}: they must differ")
    if gateway.auth == "keys":
        Keys.read(gateway.keys_file)  # the gateways do, too, and say it only in their logs
    metrics = resolved.config.metrics
    if metrics.enabled and metrics.port in (gateway.http_port, gateway.grpc_port):
        raise ConfigError(f"metrics.port is {metrics.port}, as a port of the gateway: they must differ")
    for key, host, port in (
        ("http_port", gateway.http_host, gateway.http_port),
        ("grpc_port", gateway.grpc_host, gateway.grpc_port),
    ):
        if (problem := _cannot_bind(host, port)) is not None:
            raise ConfigError(f"gateway.{key}: port {port} {problem}")
    needed, free = memory_needed(resolved), psutil.virtual_memory().available
    if needed > free:
        raise ConfigError(
            f"this deployment needs about {needed / 2**30:.1f} GiB of memory on this machine, and "
            f"{free / 2**30:.1f} GiB are free: use fewer replicas, a smaller kv_cache_mib, or a larger machine"
        )


def memory_needed(resolved: Resolved) -> int:
    """Bytes that all replicas of a laptop deployment will hold together: an estimate, rounded up."""
    config, checkpoint = resolved.config, resolved.checkpoint
    shape = checkpoint.shape
    routed = bytes_needed(checkpoint, shape.num_experts, getattr(torch, resolved.dtype))
    stored = sum(entry.file.stat().st_size for entry in {e.file: e for e in checkpoint.tensors.values()}.values())
    rest = max(stored - bytes_needed(checkpoint, shape.num_experts, checkpoint.dtype), 0)
    rest *= getattr(torch, resolved.dtype).itemsize / checkpoint.dtype.itemsize
    attention = config.attention.most_replicas * (rest + (config.attention.kv_cache_mib << 20) + ENGINE_BYTES)
    _, copies = config.expert_copies
    processes = config.experts.groups * copies + config.router.replicas
    return int(routed * copies + attention + processes * PROCESS_BYTES + RAY_BYTES)


def _check_lengths(config: DeploymentConfig, checkpoint: Checkpoint) -> None:
    context = checkpoint.config.get("max_position_embeddings")
    if isinstance(context, int) and config.model.max_model_len > context:
        raise ConfigError(
            f"model.max_model_len is {config.model.max_model_len}, and the checkpoint's context is {context}: lower it"
        )
    frame_bytes = Limits.of(checkpoint.shape, max_rows=config.max_rows).max_payload_bytes
    if frame_bytes > MAX_FRAME_BYTES:
        raise ConfigError(
            f"a step of {config.max_rows} tokens needs {frame_bytes / 2**30:.1f} GiB in one message, and the limit is "
            f"{MAX_FRAME_BYTES / 2**30:.0f} GiB: lower model.max_model_len"
        )


def _check_cpu_attention(model: Mapping[str, object]) -> None:
    rank, rope_dim = model.get("kv_lora_rank"), model.get("qk_rope_head_dim")
    if rank is None:
        return  # no latent attention, so none of its limits
    if (rank, rope_dim) != (CPU_KV_LORA_RANK, CPU_ROPE_HEAD_DIM):
        raise ConfigError(
            f"vLLM's CPU attention needs kv_lora_rank {CPU_KV_LORA_RANK} and qk_rope_head_dim {CPU_ROPE_HEAD_DIM}, and "
            f"this checkpoint has {rank} and {rope_dim}: serve it on a machine with a CUDA GPU"
        )
    rope = model.get("rope_parameters") or model.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type")) if isinstance(rope, dict) else None
    if kind != "yarn":
        raise ConfigError(
            f"this checkpoint's rope_type is {kind or 'default'}, for which vLLM's CPU kernel computes wrong tokens "
            "with latent attention: use a checkpoint with yarn, or a machine with a CUDA GPU"
        )


def _cannot_bind(host: str, port: int) -> str | None:
    """Why nothing could listen there, or None."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return "is in use; choose another one, or end what listens there"
        return f"cannot be used on gateway.http_host {host}: {error.strerror}"
    return None


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(problem["loc"][-1]), _known_keys(problem["loc"][:-1]), n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(_known_keys(problem['loc'][:-1]))}"
        return f"unknown key {where}{hint}"
    return f"{where} is {problem['input']!r}: {problem['msg'].lower()}"


def _known_keys(section: tuple[int | str, ...]) -> list[str]:
    if not section:
        return list(DeploymentConfig.model_fields)
    field = DeploymentConfig.model_fields.get(str(section[0]))
    kind = field.annotation if field is not None else None
    return list(kind.model_fields) if isinstance(kind, type) and issubclass(kind, Settings) else []


def state_dir() -> Path:
    """Where checkpoints that we made and the running cluster's file are kept.

    EXPERTMESH_HOME; else `.expertmesh` in the source tree that we run from; else a folder in the user's cache.
    """
    home = os.environ.get("EXPERTMESH_HOME")
    source = Path(__file__).parents[1]
    if home:
        return Path(home).absolute()
    if (source / "pyproject.toml").exists():
        return source / ".expertmesh"
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "expertmesh"
