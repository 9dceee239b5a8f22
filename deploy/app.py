"""The one Serve application, built from a config, for `serve deploy`, RayService and `expertmesh up` alike."""

from typing import TypeVar

from ray import serve
from ray.serve import Application
from ray.serve.schema import ServeDeploySchema

from cluster.attention import Attention
from cluster.autoscale_config import AutoscaleConfig
from cluster.config import AttentionConfig, GatewayConfig, GatewayModel
from cluster.controller import Controller
from cluster.exporter import Publisher
from cluster.ingress import Gateway
from cluster.output_inbox import InboxOptions
from deploy.config import DeploymentConfig, PlacementConfig, Resolved, pinned, resolve
from deploy.sizing import CONTROLLER_CPUS
from experts.config import ExpertsConfig, Settings
from experts.group import ExpertGroup
from experts.served_model import ServedModel
from router.config import RouterConfig
from router.service import Router

_Section = TypeVar("_Section", bound=Settings)

APP_NAME = "expertmesh"
GRACE_S = 5.0  # for a replica that has no streams to finish
DRAIN_MARGIN_S = 5.0  # Serve ends a replica that takes longer; it has told its clients by then
ELASTIC_GATEWAY = ("max_open_requests", "drain_timeout_s")
REPORT_EVERY_S = 1.0  # an expert replica tells Serve its load
ELASTIC_ATTENTION = ("replicas", "max_replicas", "target_open_requests", "max_queued_requests", "drain_timeout_s")


def build(args: dict[str, object]) -> Application:
    """The application, with a replica of each deployment; how many there shall be is said beside it (`_elastic`).

    args: `config` (a DeploymentConfig as a dict), `runtime_dir`, and perhaps `secret_file`.
    """
    config = DeploymentConfig.model_validate(args["config"])
    resolved = resolve(config)
    model = ServedModel(
        checkpoint=str(resolved.checkpoint.path),
        dtype=resolved.dtype,
        num_groups=config.experts.groups,
        max_rows=config.max_rows,
        runtime_dir=str(args["runtime_dir"]),
        secret_path=None if args.get("secret_file") is None else str(args["secret_file"]),
    )
    publisher = Publisher.of(config.metrics, model.runtime_dir)
    controller = _deployment(Controller, "controller", num_cpus=CONTROLLER_CPUS).bind(
        num_groups=model.num_groups, lease_s=config.experts.lease_s, publisher=publisher
    )
    groups = [_expert_group(controller, model, config, group, publisher) for group in range(model.num_groups)]
    router = _deployment(Router, "router", num_cpus=config.router.num_cpus).bind(
        controller, model, config.router, publisher
    )
    attention = _deployment(
        Attention,
        "attention",
        num_cpus=config.attention.num_cpus,
        max_ongoing_requests=4 * config.attention.max_num_seqs,
    ).bind(controller, model, config.attention, config.model.max_model_len, publisher, traces=config.traces)
    gateway = config.gateway
    served = GatewayModel(
        checkpoint=model.checkpoint,
        served_name=resolved.served_name,
        dtype=resolved.dtype,
        max_model_len=config.model.max_model_len,
    )
    return _deployment(Gateway, "gateway", num_cpus=gateway.num_cpus).bind(
        served,
        gateway,
        attention,
        controller,
        drops_rows=config.router.capacity_factor is not None,
        # A Serve application is what its ingress refers to; the gateway itself never calls these.
        keep=[router, *groups],
        # Links that stay on a node need no port, and their secret is where the engine's is.
        inbox=InboxOptions(runtime_dir=model.runtime_dir, secret_file=str(model.secret_file))
        if config.experts.listen == "unix"
        else None,
        publisher=publisher,
        traces=config.traces,
    )


def serve_config(resolved: Resolved, runtime_dir: str) -> ServeDeploySchema:
    """The declarative form of the application, for a cluster of this machine."""
    return serve_config_of(pinned(resolved), runtime_dir=runtime_dir)


def serve_config_of(config: DeploymentConfig, *, runtime_dir: str, secret_file: str | None = None) -> ServeDeploySchema:
    """The declarative form of the application, as `serve deploy` and RayService take it.

    The checkpoint is opened where the application is built, so its folder need not be on this machine.
    runtime_dir: a folder that every node has, for Unix sockets. secret_file: on every node, the same bytes; None:
    `secret` in runtime_dir.
    """
    args: dict[str, object] = {"config": _fixed(config).model_dump(), "runtime_dir": runtime_dir}
    if secret_file is not None:
        args["secret_file"] = secret_file
    application = {
        "name": APP_NAME,
        "route_prefix": None,  # the gateway has servers of its own
        "import_path": "deploy.app:build",
        "args": args,
        "deployments": _elastic(config),
    }
    return ServeDeploySchema.model_validate({"applications": [application], "proxy_location": "Disabled"})


def _elastic(config: DeploymentConfig) -> list[dict[str, object]]:
    """What may change while the cluster runs, without a restart of any replica that stays.

    Serve restarts everything when the application's arguments are others, so none of this may be among them.
    """
    gateway, attention, place = config.gateway, config.attention, config.placement
    return [
        {
            "name": "controller",
            "ray_actor_options": _booked(CONTROLLER_CPUS, place.controller),
            **_replaced(surge=False),
        },
        {
            "name": "gateway",
            **_where(gateway, place.gateway),
            **_replaced(grace_s=gateway.drain_timeout_s + DRAIN_MARGIN_S),
            "num_replicas": gateway.replicas,
            "user_config": {name: getattr(gateway, name) for name in ELASTIC_GATEWAY},
        },
        {
            "name": "router",
            **_where(config.router, place.router),
            # Where each node has as many as it may, one goes before the next comes; another one takes over there.
            **_replaced(surge=config.router.max_replicas_per_node is None),
            "num_replicas": config.router.replicas,
        },
        {
            "name": "attention",
            **_where(attention, place.attention, attention.num_gpus),
            **_replaced(surge=not attention.num_gpus, grace_s=attention.drain_timeout_s),
            **_attention_scaling(attention),
            "max_queued_requests": attention.max_queued_requests,
        },
        *(
            {
                "name": f"experts-{group}",
                **_where(config.experts, place.experts, config.experts.num_gpus),
                **_replaced(surge=not config.experts.num_gpus),
                "autoscaling_config": _expert_scaling(config),
            }
            for group in range(config.experts.groups)
        ),
    ]


def _replaced(*, surge: bool = True, grace_s: float = GRACE_S) -> dict[str, object]:
    """How a replica makes room for its replacement.

    surge: it stays until the replacement is ready. There is no GPU to spare for that, most likely, and two controllers
    at a time would each know half of the members.
    """
    return {"max_surge_percent": 100 if surge else 0, "graceful_shutdown_timeout_s": grace_s}


def _fixed(config: DeploymentConfig) -> DeploymentConfig:
    """The config with everything that `_elastic` says at its default: what is left can only change with a restart."""
    sections = {
        "gateway": _without(config.gateway, "replicas", *ELASTIC_GATEWAY),
        "router": _without(config.router, "replicas"),
        "attention": _without(config.attention, *ELASTIC_ATTENTION),
        "experts": _without(config.experts, "replicas"),
        "autoscale": AutoscaleConfig(window_s=config.autoscale.window_s),
        "placement": PlacementConfig(),
    }
    return config.model_copy(update=sections)


def _without(section: _Section, *keys: str) -> _Section:
    """The section with these keys at their defaults."""
    fields = type(section).model_fields
    return section.model_copy(update={key: fields[key].default for key in (*keys, "max_replicas_per_node")})


def _where(
    section: GatewayConfig | RouterConfig | AttentionConfig | ExpertsConfig, labels: dict[str, str], num_gpus: float = 0
) -> dict[str, object]:
    """What a replica books, on which nodes, and how many of them on one."""
    options: dict[str, object] = {"ray_actor_options": _booked(section.num_cpus, labels, num_gpus=num_gpus)}
    most = section.max_replicas_per_node
    return options if most is None else {**options, "max_replicas_per_node": most}


def _booked(num_cpus: float, labels: dict[str, str], *, num_gpus: float = 0) -> dict[str, object]:
    booked: dict[str, object] = {"num_cpus": num_cpus, "num_gpus": num_gpus}
    return booked | ({"label_selector": labels} if labels else {})


def _attention_scaling(attention: AttentionConfig) -> dict[str, object]:
    """By open requests, as Serve scales anything."""
    if attention.most_replicas == attention.replicas:
        return {"num_replicas": attention.replicas}
    scaling = {
        "min_replicas": attention.replicas,
        "max_replicas": attention.max_replicas,
        "target_ongoing_requests": attention.target_open_requests,
    }
    return {"autoscaling_config": scaling}


def _expert_scaling(config: DeploymentConfig) -> dict[str, object]:
    """Serve's autoscaling of one expert group, by our policy; also where the bounds leave nothing to decide.

    So a group whose bounds are moved apart later needs no restart.
    """
    least, most = config.expert_copies
    return {
        "min_replicas": least,
        "max_replicas": most,
        # The policy has delays of its own, and what it decides is meant.
        "upscale_delay_s": 0.0,
        "downscale_delay_s": 0.0,
        "metrics_interval_s": REPORT_EVERY_S,
        "look_back_period_s": 5 * REPORT_EVERY_S,
        "policy": {
            "policy_function": "cluster.autoscale_policy:ExpertLoadPolicy",
            "policy_kwargs": config.autoscale.model_dump(exclude={"min_replicas", "max_replicas"}),
        },
    }


def _expert_group(
    controller: Application, model: ServedModel, config: DeploymentConfig, group: int, publisher: Publisher
) -> Application:
    experts = config.experts
    return _deployment(ExpertGroup, f"experts-{group}", num_cpus=experts.num_cpus).bind(
        controller,
        model,
        experts,
        group,
        load_window_s=config.autoscale.window_s,
        publish=publisher,
    )


def _deployment(cls: type, name: str, *, num_cpus: float, max_ongoing_requests: int = 1000) -> serve.Deployment:
    """What a replica may do; where it is, and how it is replaced, is said beside the application (`_elastic`)."""
    decorate = serve.deployment(
        name=name,
        ray_actor_options={"num_cpus": num_cpus},
        max_ongoing_requests=max_ongoing_requests,
        # A replica that dies is noticed within a second or so; Serve's default is ten.
        health_check_period_s=1,
        health_check_timeout_s=5,
    )
    return decorate(cls)
