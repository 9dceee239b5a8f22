"""A process of bench_serving that is a router or an expert group: the product's own servers, without Ray.

    python -m benchmarks.serving_member router MODEL CONFIG
    python -m benchmarks.serving_member experts MODEL CONFIG GROUP

MODEL: the fields of a ServedModel; CONFIG: a DeploymentConfig; both as JSON.
An expert group's first answer is its Replica; it takes no requests. A router answers {"replicas": [...]}, a static
placement, once it has a link to each of them.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict

import torch

from benchmarks.serving_child import Request, serve
from deploy.config import DeploymentConfig
from experts.checkpoint import open_checkpoint
from experts.compute import make_expert_ffn
from experts.gently import give_way
from experts.handshake import Identity, Role, fresh_incarnation, read_secret
from experts.logs import set_up_logs
from experts.placement import Placement, Replica
from experts.served_model import ServedModel
from experts.server import ExpertServer
from experts.weights import load_group
from experts.wire import Limits
from router.server import RouterServer
from router.service import make_gate

LINK_TIMEOUT_S = 30.0


def start_experts(model: ServedModel, config: DeploymentConfig, group: int) -> Replica:
    """As experts/group.py does, less the lease; serves on a thread of its own from now on."""
    torch.set_num_threads(config.experts.threads)
    checkpoint = open_checkpoint(model.checkpoint)
    shape = checkpoint.shape
    held = shape.home_experts(group, model.num_groups)
    incarnation = fresh_incarnation()
    server = ExpertServer(
        make_expert_ffn(load_group(checkpoint, held, model.torch_dtype), path=config.experts.compute),
        held=held,
        layers=frozenset(shape.moe_layers),
        dtype=model.torch_dtype,
        num_experts=shape.num_experts,
        address=f"unix:{model.runtime_dir}/e{group}-{incarnation:x}.sock",
        secret=read_secret(model.secret_file),
        fingerprint=model.fingerprint(checkpoint),
        incarnation=incarnation,
        group=group,
        limits=Limits.of(shape, max_rows=model.max_rows),
    )
    give_way(config.experts.niceness)
    server.start()
    return Replica(member_id=f"experts-{group}", group=group, address=server.address, incarnation=incarnation)


def start_router(model: ServedModel, config: DeploymentConfig) -> RouterServer:
    """As router/service.py does, less lease and controller."""
    checkpoint = open_checkpoint(model.checkpoint)
    identity = Identity(
        role=Role.ROUTER,
        member_id="router",
        incarnation=fresh_incarnation(),
        fingerprint=model.fingerprint(checkpoint),
    )
    server = RouterServer(
        make_gate(checkpoint),
        identity=identity,
        secret=read_secret(model.secret_file),
        address=model.router_address,
        limits=Limits.of(checkpoint.shape, max_rows=model.max_rows),
        num_groups=model.num_groups,
        dispatch_timeout_s=config.router.dispatch_timeout_s,
        capacity_factor=config.router.capacity_factor,
    )
    server.start()
    return server


def place(server: RouterServer, placement: Placement) -> None:
    """Raises RuntimeError where not every group is linked in time."""
    server.set_placement(placement)
    deadline_s = time.monotonic() + LINK_TIMEOUT_S
    while len(server.connected_groups) < placement.num_groups:
        if time.monotonic() > deadline_s:
            missing = sorted(set(range(placement.num_groups)) - server.connected_groups)
            raise RuntimeError(f"the router did not reach the expert groups {missing} within {LINK_TIMEOUT_S:g} s")
        time.sleep(0.05)


def start() -> tuple[object, Callable[[Request], object]]:
    """Becomes what the command line says."""
    set_up_logs()
    kind, model_json, config_json, *rest = sys.argv[1:]
    model, config = ServedModel(**json.loads(model_json)), DeploymentConfig.model_validate_json(config_json)
    if kind == "experts":
        return asdict(start_experts(model, config, int(rest[0]))), _refuse
    server = start_router(model, config)

    def handle(request: Request) -> None:
        replicas = request["replicas"]
        assert isinstance(replicas, list)
        placed = tuple(Replica(**replica) for replica in replicas)
        place(server, Placement(version=1, num_groups=model.num_groups, replicas=placed))

    return None, handle


def _refuse(request: Request) -> None:
    raise ValueError(f"an expert group takes no requests here: {sorted(request)}")


if __name__ == "__main__":
    serve(start)
