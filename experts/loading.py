"""The start of a copy of an expert group: its weights, and what computes and serves them."""

import logging
import time
from dataclasses import dataclass
from typing import Self

import psutil
import torch

from experts.checkpoint import Checkpoint, open_checkpoint
from experts.compute import ExpertFFN, make_expert_ffn
from experts.config import ExpertsConfig
from experts.errors import ConfigError
from experts.handshake import read_secret
from experts.load import LoadMeter, pair_flops
from experts.metrics import ExpertMetrics
from experts.served_model import ServedModel
from experts.server import ExpertServer
from experts.shape import MoEShape
from experts.weights import bytes_needed, load_group
from experts.wire import Limits

log = logging.getLogger(__name__)

PROGRESS_EVERY_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedGroup:
    """The home experts of one group in every MoE layer, ready to compute."""

    model: ServedModel
    group: int
    shape: MoEShape
    held: range
    fingerprint: bytes
    ffn: ExpertFFN

    @classmethod
    def of(cls, model: ServedModel, config: ExpertsConfig, group: int) -> Self:
        """Reads the weights. Raises ConfigError where they do not fit into the memory that is free."""
        checkpoint = open_checkpoint(model.checkpoint)
        shape = checkpoint.shape
        held = shape.home_experts(group, model.num_groups)
        check_memory(checkpoint, len(held), model.torch_dtype, on_gpu=config.num_gpus > 0)
        device = torch.device("cuda") if config.num_gpus > 0 else None
        weights = load_group(checkpoint, held, model.torch_dtype, on_progress=_progress(group), device=device)
        return cls(
            model=model,
            group=group,
            shape=shape,
            held=held,
            fingerprint=model.fingerprint(checkpoint),
            ffn=make_expert_ffn(weights, path=config.compute),
        )

    def load_meter(self, window_s: float) -> LoadMeter:
        """window_s: time constant of its averages."""
        shape = self.shape
        flops = pair_flops(hidden_size=shape.hidden_size, moe_intermediate_size=shape.moe_intermediate_size)
        return LoadMeter(flops_per_pair=flops, window_s=window_s, now_s=time.monotonic())

    def server(self, address: str, *, incarnation: int, load: LoadMeter) -> ExpertServer:
        """The data plane's thread, not started yet."""
        return ExpertServer(
            self.ffn,
            held=self.held,
            layers=frozenset(self.shape.moe_layers),
            dtype=self.model.torch_dtype,
            num_experts=self.shape.num_experts,
            address=address,
            secret=read_secret(self.model.secret_file),
            fingerprint=self.fingerprint,
            incarnation=incarnation,
            group=self.group,
            limits=Limits.of(self.shape, max_rows=self.model.max_rows),
            load=load,
        )

    def metrics(self, server: ExpertServer) -> ExpertMetrics:
        return ExpertMetrics(server, group=self.group, held=self.held, layers=self.shape.moe_layers)


def check_memory(checkpoint: Checkpoint, num_experts_held: int, dtype: torch.dtype, *, on_gpu: bool) -> None:
    """Raises ConfigError where the experts of one replica do not fit into the memory that is free."""
    needed = bytes_needed(checkpoint, num_experts_held, dtype)
    free = torch.cuda.mem_get_info()[0] if on_gpu else psutil.virtual_memory().available
    if needed > free:
        raise ConfigError(
            f"an expert group needs {needed / 2**30:.1f} GiB for {num_experts_held} experts a layer, and "
            f"{free / 2**30:.1f} GiB are free: raise experts.groups, or use machines with more memory"
        )


def _progress(group: int):
    started_s = said_s = time.monotonic()

    def say(done: int, total: int) -> None:
        nonlocal said_s
        now_s = time.monotonic()
        if now_s - said_s > PROGRESS_EVERY_S or done == total:
            said_s = now_s
            log.info("loading experts", extra={"group": group, "done": done, "total": total, "s": now_s - started_s})

    return say
