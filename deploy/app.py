"""The one Serve application, built from a config, for `serve deploy`, RayService and `expertmesh up` alike."""

from ray import serve
from ray.serve import Application
from ray.serve.schema import ServeDeploySchema

from cluster.attention import Attention
from cluster.config import GatewayConfig
from cluster.controller import Controller
from cluster.ingress import GRPC_SERVICER_FUNCTIONS, Gateway
from deploy.config import DeploymentConfig, Resolved, pinned, resolve
from experts.group import ExpertGroup, ServedModel
from router.service import Router

APP_NAME = "expertmesh"


def build(args: dict[str, object]) -> Application:
    """The application. args: `config` (a DeploymentConfig as a dict, its checkpoint a folder) and `runtime_dir`."""
    config = DeploymentConfig.model_validate(args["config"])
    resolved = resolve(config)
    model = ServedModel(
        checkpoint=str(resolved.checkpoint.path),
        dtype=resolved.dtype,
        num_groups=config.experts.groups,
        max_rows=config.max_rows,
        runtime_dir=str(args["runtime_dir"]),
    )
    controller = _deployment(Controller, "controller", num_cpus=0.1).bind(
        num_groups=model.num_groups, lease_s=config.experts.lease_s
    )
    groups = [_expert_group(controller, model, config, group) for group in range(model.num_groups)]
    router = _deployment(Router, "router", num_replicas=config.router.replicas, num_cpus=config.router.num_cpus).bind(
        controller, model, config.router
    )
    attention = _deployment(
        Attention,
        "attention",
        num_replicas=config.attention.replicas,
        num_cpus=config.attention.num_cpus,
        num_gpus=config.attention.num_gpus,
        max_ongoing_requests=4 * config.attention.max_num_seqs,
        max_queued_requests=config.attention.max_queued_requests,
    ).bind(controller, model, config.attention, config.model.max_model_len)
    gateway = config.gateway
    return _deployment(
        Gateway,
        "gateway",
        num_replicas=gateway.replicas,
        num_cpus=gateway.num_cpus,
        max_ongoing_requests=gateway.max_ongoing_requests,
    ).bind(
        checkpoint=model.checkpoint,
        served_name=resolved.served_name,
        dtype=resolved.dtype,
        max_model_len=config.model.max_model_len,
        request_timeout_s=gateway.request_timeout_s,
        attention=attention,
        drops_rows=config.router.capacity_factor is not None,
        controller=controller,
        # A Serve application is what its ingress refers to; the gateway itself never calls these.
        keep=[router, *groups],
    )


def serve_config(resolved: Resolved, runtime_dir: str) -> ServeDeploySchema:
    """The declarative form of the application, as `serve deploy` and RayService take it."""
    config = resolved.config
    args = {"config": pinned(resolved).model_dump(), "runtime_dir": runtime_dir}
    return ServeDeploySchema.model_validate(
        {
            "applications": [{"name": APP_NAME, "route_prefix": "/", "import_path": "deploy.app:build", "args": args}],
            **serve_options(config.gateway),
        }
    )


def serve_options(gateway: GatewayConfig) -> dict[str, dict[str, object]]:
    """What belongs to the whole Serve instance: the two front doors."""
    return {
        "http_options": {"host": gateway.http_host, "port": gateway.http_port},
        "grpc_options": {
            "port": gateway.grpc_port,
            "grpc_servicer_functions": list(GRPC_SERVICER_FUNCTIONS),
            "enable_reflection": True,
        },
    }


def _expert_group(controller: Application, model: ServedModel, config: DeploymentConfig, group: int) -> Application:
    experts = config.experts
    return _deployment(
        ExpertGroup,
        f"experts-{group}",
        num_replicas=experts.replicas,
        num_cpus=experts.num_cpus,
        num_gpus=experts.num_gpus,
    ).bind(controller, model, experts, group)


def _deployment(
    cls: type,
    name: str,
    *,
    num_cpus: float,
    num_gpus: float = 0,
    num_replicas: int = 1,
    max_ongoing_requests: int = 1000,
    max_queued_requests: int = -1,  # no limit, as Serve has it
    max_replicas_per_node: int | None = None,
) -> serve.Deployment:
    options = {"num_cpus": num_cpus, "num_gpus": num_gpus}
    decorate = serve.deployment(
        name=name,
        num_replicas=num_replicas,
        ray_actor_options=options,
        max_ongoing_requests=max_ongoing_requests,
        max_queued_requests=max_queued_requests,
        graceful_shutdown_timeout_s=5,
        # A replica that dies is noticed within a second or so; Serve's default is ten.
        health_check_period_s=1,
        health_check_timeout_s=5,
    )
    deployment = decorate(cls)
    return (
        deployment if max_replicas_per_node is None else deployment.options(max_replicas_per_node=max_replicas_per_node)
    )
