"""The arithmetic of deploy/sizing.py as text: `python -m deploy.sizing_page > docs/sizing.md`, in the source tree."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy import sizing
from deploy.config import DeploymentConfig, load
from deploy.model_size import group_counts
from deploy.sizing import GIB, GPU_MEMORY_GIB, MIB, DeviceUse, PodSize, Sizing, pod_sizes
from experts.errors import ConfigError

MODEL_CONFIGS = Path(__file__).parent / "model_configs"
OVERLAYS = Path(__file__).parents[1] / "k8s" / "overlays"
STREAM_TOKENS = (1024, 4096, 16384, 65536)


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A machine that pods are put on."""

    gpus: int = 8
    cpus: float = 96.0
    memory_gib: float = 1024.0

    def holds(self, pod: PodSize) -> int:
        """Pods of one kind that such a machine has room for."""
        by = [self.cpus // pod.cpus, self.memory_gib * GIB // pod.memory_bytes]
        return int(min([*by, self.gpus // pod.gpus] if pod.gpus else by))


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A model on the page, with the overlay whose config it is deployed by."""

    title: str
    model: str
    overlay: str
    gpu_memory_gib: float = GPU_MEMORY_GIB
    overrides: Mapping[str, object] | None = None
    remark: str = ""

    def config(self) -> DeploymentConfig:
        return load(OVERLAYS / self.overlay / "deployment.yaml", self.overrides)

    def model_config(self) -> Mapping[str, object]:
        return json.loads((MODEL_CONFIGS / f"{self.model}.json").read_text(encoding="utf-8"))


EXAMPLES = (
    Example(title="DeepSeek-V2-Lite", model="deepseek-v2-lite", overlay="v2-lite"),
    Example(title="DeepSeek-V2", model="deepseek-v2", overlay="v2"),
    Example(
        title="DeepSeek-V3",
        model="deepseek-v3",
        overlay="v2",
        gpu_memory_gib=192.0,
        overrides={"model.checkpoint": "/models/deepseek-v3", "attention.kv_cache_mib": 24576},
        remark=(
            "The checkpoint as published has FP8 weights, which are not served: these are the numbers of one that has "
            "been converted to BF16.\nIts prediction layer (MTP), 11.5 B parameters more, is not loaded.\n"
        ),
    ),
)


def page() -> str:
    """The whole of docs/sizing.md."""
    return "\n".join([_INTRODUCTION.format(**_constants()), *(_chapter(example) for example in EXAMPLES)])


def report(
    config: DeploymentConfig,
    model: Mapping[str, object],
    *,
    gpu_memory_gib: float = GPU_MEMORY_GIB,
    node: Node | None = None,
) -> str:
    """The sizes of one deployment as Markdown. Raises ConfigError as pod_sizes does."""
    pods = pod_sizes(config, model, gpu_memory_gib=gpu_memory_gib)
    it = Sizing.of(config, model, gpu_memory_gib=gpu_memory_gib)
    parts = [_parts(it), _groups(it), _kv(it), _pods(pods, node or Node())]
    return "\n".join(parts)


def _chapter(example: Example) -> str:
    config, model = example.config(), example.model_config()
    changed = ", ".join(f"`{key}: {value}`" for key, value in (example.overrides or {}).items())
    lines = [
        f"## {example.title}\n",
        f"As overlay `{example.overlay}` says{f', but with {changed}' if changed else ''}.",
        f"GPUs of {example.gpu_memory_gib:g} GiB.",
    ]
    if example.gpu_memory_gib != GPU_MEMORY_GIB:
        lines.append(f'With {GPU_MEMORY_GIB:g} GiB it is refused: "{_why_refused(config, model)}".')
    body = report(config, model, gpu_memory_gib=example.gpu_memory_gib)
    return "\n".join([*lines, example.remark, body])


def _why_refused(config: DeploymentConfig, model: Mapping[str, object]) -> str:
    try:
        pod_sizes(config, model)
    except ConfigError as error:
        return str(error)
    raise AssertionError("the example fits into smaller GPUs, too")


def _parts(it: Sizing) -> str:
    size, b = it.size, it.dtype
    layers = len(size.shape.moe_layers)
    experts = f"{size.shape.num_experts} routed experts in each of {layers} layers"
    rows = [
        (experts, size.routed, "expert groups"),
        ("attention projections", size.attention, "attention"),
        ("shared experts", size.shared, "attention"),
        (f"dense layers ({size.num_layers - layers})", size.dense, "attention"),
        ("embeddings and output", size.embeddings, "attention"),
        ("gates", size.gates, "attention"),
        ("norms", size.norms, "attention"),
        ("**together**", size.total, ""),
    ]
    bytes_each = size.rest_bytes(b) // size.rest
    cells = [(name, f"{count:,}", _gib(count * bytes_each), where) for name, count, where in rows]
    return _table((f"part ({b})", "parameters", "GiB", "on GPUs of"), cells)


def _groups(it: Sizing) -> str:
    cells: list[Sequence[str]] = []
    for groups in group_counts(it.size.shape):
        use = _with_groups(it, groups).experts
        held = it.size.shape.num_experts // groups
        chosen = f"**{groups}**" if groups == it.config.experts.groups else str(groups)
        cells.append((chosen, str(held), *_device(use), _gib(use.smallest_gpu_gib * GIB)))
    head = ("D", "experts of a layer in a group", "weights, GiB", "largest step, GiB", "GPU memory at least, GiB")
    return _table(head, cells)


def _with_groups(it: Sizing, groups: int) -> Sizing:
    experts = it.config.experts.model_copy(update={"groups": groups})
    config = it.config.model_copy(update={"experts": experts})
    return Sizing(config=config, size=it.size, dtype=it.dtype, gpu_memory_gib=it.gpu_memory_gib)


def _kv(it: Sizing) -> str:
    room, given = it.kv_room_bytes, it.kv_cache_bytes
    weights, work = _device(it.attention)
    cells = [
        ("weights, GiB", weights, weights),
        ("largest step, GiB", work, work),
        ("KV cache, GiB", _gib(given), _gib(room)),
        ("bytes per token", *[f"{it.size.kv_bytes_per_token(it.dtype):,}"] * 2),
        ("tokens in the cache", f"{it.kv_tokens(given):,}", f"{it.kv_tokens(room):,}"),
    ]
    longest = it.config.model.max_model_len
    for tokens in (*(t for t in STREAM_TOKENS if t < longest), longest):
        streams = (f"{it.kv_tokens(num_bytes) // tokens:,}" for num_bytes in (given, room))
        cells.append((f"streams of {tokens:,} tokens", *streams))
    cells.append(("requests in one step at most (max_num_seqs)", *[str(it.config.attention.max_num_seqs)] * 2))
    given_mib = it.config.attention.kv_cache_mib
    head = ("attention, one GPU", f"kv_cache_mib {given_mib}", f"at most: kv_cache_mib {max(room, 0) // MIB}")
    return _table(head, cells)


def _pods(pods: Mapping[str, PodSize], node: Node) -> str:
    cells = [
        (
            name,
            str(pod.replicas),
            str(pod.max_replicas),
            f"{pod.cpus:g}",
            _gib(pod.memory_bytes),
            f"{pod.shm_bytes // MIB}",
            str(pod.gpus),
            str(node.holds(pod)),
        )
        for name, pod in pods.items()
    ]
    head = ("pods", "at least", "at most", "CPUs", "memory, GiB", "/dev/shm, MiB", "GPUs", "on one node by themselves")
    gpus = [sum(getattr(pod, count) * pod.gpus for pod in pods.values()) for count in ("replicas", "max_replicas")]
    said = f"A node: {node.gpus} GPUs, {node.cpus:g} CPUs, {node.memory_gib:g} GiB of memory. "
    return _table(head, cells) + f"\n{said}GPUs in all: {gpus[0]}, and {gpus[1]} when everything is scaled up.\n"


def _device(use: DeviceUse) -> tuple[str, str]:
    return _gib(use.weights_bytes), _gib(use.work_bytes)


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _constants() -> dict[str, str]:
    return {
        "gpu_percent": f"{sizing.GPU_SHARE:.0%}",
        "margin_percent": f"{sizing.MARGIN - 1:.0%}",
        "process": f"{sizing.PROCESS_BYTES // MIB}",
        "engine": f"{sizing.ENGINE_BYTES // MIB}",
        "ray": f"{sizing.RAY_BYTES // MIB}",
        "cuda": f"{sizing.CUDA_BYTES // MIB}",
        "shm": f"{sizing.SHM_BYTES // MIB}",
        "rounded": f"{sizing.ROUND_BYTES // MIB}",
        "context": f"{sizing.CONTEXT_TOKENS:,}",
    }


_INTRODUCTION = """\
# Sizing

How much memory a deployment needs, where, and how many pods and GPUs that is.
`expertmesh render` puts the same numbers into the manifests ([Kubernetes](../k8s/README.md)).
The page is made by `python -m deploy.sizing_page > docs/sizing.md`, from the config files of the overlays and the values of the models' own config.json in `deploy/model_configs`; `tests/unit/test_sizing.py` compares it with the code.
Nothing on it was measured on a GPU: it is arithmetic, and what is an estimate says so.

## What is counted

- **Weights** are exact: the parameters of every part, from the shapes in config.json. Routed experts are split over the D expert groups; all else is in every attention engine.
- **KV cache**: with latent attention a layer keeps `kv_lora_rank + qk_rope_head_dim` numbers for a token, whatever the number of heads.
- **The largest step** is an estimate from above: all rows that the config allows (`max_model_len` or `max_num_seqs`, whichever is more), for an expert group from all engines at once and each row with all its experts there. For an engine it has the tensors of one layer, the logits, and, since vLLM brings the earlier part of a long prompt back to full width, keys and values of up to {context} tokens.
- **GPU**: weights, the largest step and the KV cache must fit into {gpu_percent} of its memory. A replica uses one GPU, and is refused with the numbers where that is too small.
- **Pods**: one replica in each. Memory of the host is the sum of {ray} MiB for Ray, a gateway or the controller, {process} MiB for a router or an expert replica, {engine} MiB for an engine, {cuda} MiB for a process's CUDA libraries, a buffer for the largest message on each link, and what the replica keeps on the host; {margin_percent} more as a margin; {shm} MiB for /dev/shm, which counts as memory of the pod; rounded up to {rounded} MiB.
- An expert replica moves its weights to its GPU layer by layer, so its pod has room for two copies of one layer as memory of the host.
- **At most**: the upper bounds of scaling, and on CPUs as many pods more as an upgrade replaces at a time. With GPUs a replica is stopped before it is replaced.
"""  # noqa: E501  (a sentence a line)


if __name__ == "__main__":
    sys.stdout.write(page())
