"""All processes of bench_serving: one engine, router or expert group each, loaded once and kept until the end."""

import importlib.util
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self
from unittest.mock import patch

import psutil

from benchmarks.serving_process import Child, ChildError, ProcessMemory, clean_environment, end_all
from benchmarks.serving_setups import TP_SIZE, Member, Setup, tensor_parallel_cores
from benchmarks.serving_stats import Trace, deal
from cluster.attention import engine_arguments, plain_engine_arguments, prepare_environment
from deploy.config import DeploymentConfig
from experts.checkpoint import Checkpoint
from experts.handshake import write_secret
from experts.served_model import ServedModel
from experts.weights import bytes_needed

LOAD_TIMEOUT_S = 600.0
RUN_TIMEOUT_S = 1800.0
_ENGINE_BYTES, _PROCESS_BYTES = 800 << 20, 350 << 20  # of an empty engine, and of an empty router or expert group


@dataclass(frozen=True, slots=True, kw_only=True)
class Engines:
    """What all engines are given alike, and what only the unmodified ones are."""

    checkpoint: Checkpoint
    config: DeploymentConfig  # resolved: its checkpoint a folder, its dtype a name; experts.groups is set per plane
    baseline_threads: int  # of `vllm`, and of both ranks of `vllm-tp2` together

    def of_groups(self, num_groups: int) -> DeploymentConfig:
        experts = self.config.experts.model_copy(update={"groups": num_groups})
        return self.config.model_copy(update={"experts": experts})

    def model(self, num_groups: int, runtime_dir: str) -> ServedModel:
        """What the members of one data plane agree on. num_groups: 0 where there is none."""
        return ServedModel(
            checkpoint=str(self.checkpoint.path),
            dtype=self.config.model.dtype,
            num_groups=num_groups,
            max_rows=self.config.max_rows,
            runtime_dir=runtime_dir,
        )

    def bytes_of(self, member: Member) -> int:
        """Memory that a member is expected to need: an estimate, rather too much."""
        checkpoint, num_experts = self.checkpoint, self.checkpoint.shape.num_experts
        dtype = self.model(0, "").torch_dtype
        stored = sum(file.stat().st_size for file in {entry.file for entry in checkpoint.tensors.values()})
        rest = stored - bytes_needed(checkpoint, num_experts, checkpoint.dtype)
        rest = rest * dtype.itemsize // checkpoint.dtype.itemsize
        engine = _ENGINE_BYTES + (self.config.attention.kv_cache_mib << 20) + rest
        match member.kind:
            case "vllm":
                return engine + bytes_needed(checkpoint, num_experts, dtype)
            case "vllm-tp2":  # the ranks split most of the rest, too; and there is the process that drives them
                return _ENGINE_BYTES + TP_SIZE * engine + bytes_needed(checkpoint, num_experts, dtype)
            case "attention":
                return engine
            case "router":
                return _PROCESS_BYTES
            case "experts":
                held = num_experts // member.num_groups
                return _PROCESS_BYTES + bytes_needed(checkpoint, held, dtype)


class Fleet:
    """Owns the processes: a context manager that leaves nothing running."""

    def __init__(self, engines: Engines) -> None:
        self._engines = engines
        # Short, since it holds Unix sockets, whose paths may have 107 bytes.
        self._folder = tempfile.TemporaryDirectory(prefix="em-")
        self._children: dict[Member, Child] = {}
        self._planes: dict[int, ServedModel] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        end_all(list(self._children.values()))
        self._folder.cleanup()

    def load(self, setup: Setup) -> None:
        """Starts those processes of a setup that are not there yet, all at once, and waits until they are ready.

        Raises ChildError.
        """
        new = [member for member in setup.members if member not in self._children]
        for member in new:
            self._children[member] = self._start(member)
        deadline_s = time.monotonic() + LOAD_TIMEOUT_S
        first = {
            member: self._children[member].answer(timeout_s=max(deadline_s - time.monotonic(), 1))
            for member in new
            if not member.is_engine
        }
        for router in (member for member in new if member.kind == "router"):
            replicas = [answer for member, answer in first.items() if member.kind == "experts"]
            self._children[router].tell({"replicas": replicas})
            self._children[router].answer(timeout_s=60)
        for member in (member for member in new if member.is_engine):
            answer = self._children[member].answer(timeout_s=max(deadline_s - time.monotonic(), 1))
            _check_replaced(member, answer)

    def run(self, setup: Setup, prompts: Sequence[list[int]], num_tokens: int) -> list[Trace]:
        """One trace per engine of the setup, which share the streams and run side by side. Raises ChildError."""
        engines = [self._children[member] for member in setup.engines]
        for engine, dealt in zip(engines, deal(prompts, len(engines)), strict=True):
            engine.tell({"prompts": dealt, "num_tokens": num_tokens})
        traces = []
        for engine in engines:
            answer = engine.answer(timeout_s=RUN_TIMEOUT_S)
            assert isinstance(answer, dict)
            traces.append(Trace(**answer))
        return traces

    def others(self, setup: Setup) -> list[psutil.Process]:
        """The processes that have no part in a setup, and should be idle while it runs."""
        taking_part = set(setup.members)
        return [p for member, child in self._children.items() if member not in taking_part for p in child.family]

    def memory(self, setup: Setup) -> list[ProcessMemory]:
        return [process for member in setup.members for process in self._children[member].memory()]

    def processes(self, setup: Setup) -> list[psutil.Process]:
        """Those that have a part in a setup."""
        return [process for member in setup.members for process in self._children[member].family]

    # How each kind of member is started.

    def _start(self, member: Member) -> Child:
        log = Path(self._folder.name) / f"{member.name.replace(' ', '-')}.log"
        if member.is_engine:
            arguments = [json.dumps(self._engine_arguments(member))]
            environment = self._engine_environment(member)
            return Child(member.name, "benchmarks.serving_engine", arguments, environment=environment, log=log)
        model, config = self._plane(member.num_groups), self._engines.of_groups(member.num_groups)
        arguments = [member.kind, json.dumps(asdict(model)), config.model_dump_json(), str(member.index)]
        # What Ray gives a replica that books a fraction of a core; an expert group sets its threads itself.
        environment = clean_environment() | {"OMP_NUM_THREADS": "1"}
        return Child(member.name, "benchmarks.serving_member", arguments, environment=environment, log=log)

    def _plane(self, num_groups: int) -> ServedModel:
        if num_groups not in self._planes:
            folder = Path(self._folder.name) / str(num_groups)
            folder.mkdir()
            self._planes[num_groups] = self._engines.model(num_groups, str(folder))
            write_secret(self._planes[num_groups].secret_file)
        return self._planes[num_groups]

    def _engine_arguments(self, member: Member) -> dict[str, object]:
        config = self._engines.config
        alike: dict[str, object] = {"skip_tokenizer_init": True, "max_num_seqs": config.attention.max_num_seqs}
        max_model_len = config.model.max_model_len
        if member.kind == "attention":
            model = self._plane(member.num_groups)
            name = f"attention-{member.index}"
            return engine_arguments(model, config.attention, max_model_len=max_model_len, member_id=name) | alike
        model, kv_cache_mib = self._engines.model(0, ""), config.attention.kv_cache_mib
        plain = plain_engine_arguments(model, max_model_len=max_model_len, kv_cache_mib=kv_cache_mib) | alike
        if member.kind == "vllm-tp2":
            plain |= {"tensor_parallel_size": TP_SIZE, "distributed_executor_backend": "mp"}
        return plain

    def _engine_environment(self, member: Member) -> dict[str, str]:
        modified = member.kind == "attention"
        of_all = self._engines.config.attention.threads
        threads = member.share_of(of_all) if modified else self._engines.baseline_threads
        with patch.dict(os.environ, clean_environment(), clear=True):
            prepare_environment(threads=threads)
            environment = dict(os.environ)
        environment |= dict.fromkeys(("VLLM_CACHE_ROOT", "VLLM_CONFIG_ROOT"), f"{self._folder.name}/vllm")
        environment |= _preload()
        if not modified:
            environment |= {"VLLM_PLUGINS": ""}  # an allow-list: no plugin, ours included
            del environment["EXPERTMESH_ATTENTION"]
        if member.kind == "vllm-tp2":
            cores = sorted(os.sched_getaffinity(0))
            environment["VLLM_CPU_OMP_THREADS_BIND"] = tensor_parallel_cores(cores, threads)
            del environment["OMP_NUM_THREADS"]  # vLLM sets it for each rank
        return environment


def _preload() -> Mapping[str, str]:
    """The libraries that vLLM loads first in every process that it starts itself, as an attention replica's engine is.

    Ours are started by us, so we do it: otherwise the ranks of `vllm-tp2` alone would have them.
    """
    found = []
    for package, pattern in (("vllm", "libs/libtcmalloc*.so*"), ("torch", "lib/libgomp*.so*")):
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.origin is not None
        found += sorted(map(str, Path(spec.origin).parent.glob(pattern)))[:1]
    return {"LD_PRELOAD": ":".join(found)} if found else {}


def _check_replaced(member: Member, answer: object) -> None:
    """A benchmark of the wrong thing is worth nothing: vLLM must be modified exactly where it is meant to be."""
    replaced = answer["replaced"] if isinstance(answer, dict) else None
    if bool(replaced) != (member.kind == "attention"):
        what = f"a plugin replaced {replaced} in it" if replaced else "our plugin is not active in it; run `make setup`"
        raise ChildError(f"{member.name} is not what it is meant to be: {what}")
