"""The application's declarative form: what may change in a running cluster, and what restarts it."""

from pathlib import Path

import pytest

from deploy.app import serve_config, serve_config_of
from deploy.config import DeploymentConfig, resolve
from deploy.local import booked_cpus

Config = dict[str, dict[str, object]]


def application(nano: Path, config: Config):
    whole = DeploymentConfig.model_validate({**config, "model": {"checkpoint": str(nano), "max_model_len": 256}})
    (application,) = serve_config(resolve(whole), "/run").applications
    return application


def deployment(nano: Path, name: str, config: Config) -> dict[str, object]:
    found = {deployment.name: deployment for deployment in application(nano, config).deployments}
    return found[name].model_dump(exclude_unset=True)


@pytest.mark.parametrize(
    "config",
    [
        {"gateway": {"replicas": 2, "max_open_requests": 5, "drain_timeout_s": 1.0}},
        {"router": {"replicas": 2}},
        {"attention": {"replicas": 2, "max_queued_requests": 7, "drain_timeout_s": 1.0}},
        {"attention": {"max_replicas": 3, "target_open_requests": 4.0}},
        {"experts": {"replicas": 3}},
        {"autoscale": {"max_replicas": 4}},
    ],
)
def test_numbers_of_replicas_and_limits_are_no_arguments_of_the_application(nano: Path, config: Config) -> None:
    assert application(nano, config).args == application(nano, {}).args
    assert application(nano, config).deployments != application(nano, {}).deployments


@pytest.mark.parametrize("config", [{"attention": {"threads": 2}}, {"router": {"dispatch_timeout_s": 1.0}}])
def test_anything_else_is_an_argument(nano: Path, config: Config) -> None:
    assert application(nano, config).args != application(nano, {}).args


def test_an_expert_group_has_its_policy_even_where_its_bounds_leave_nothing_to_decide(nano: Path) -> None:
    fixed = deployment(nano, "experts-0", {"experts": {"replicas": 2}})["autoscaling_config"]
    free = deployment(nano, "experts-3", {"autoscale": {"min_replicas": 2, "max_replicas": 5}})["autoscaling_config"]
    assert isinstance(fixed, dict) and isinstance(free, dict)
    assert (fixed["min_replicas"], fixed["max_replicas"]) == (2, 2)
    assert (free["min_replicas"], free["max_replicas"]) == (2, 5)
    assert fixed["policy"] == free["policy"]


def test_attention_is_scaled_by_open_requests_only_where_there_is_room(nano: Path) -> None:
    assert deployment(nano, "attention", {"attention": {"replicas": 2}})["num_replicas"] == 2
    scaled = deployment(nano, "attention", {"attention": {"max_replicas": 3, "target_open_requests": 8.0}})
    assert "num_replicas" not in scaled
    assert scaled["autoscaling_config"] == {"min_replicas": 1, "max_replicas": 3, "target_ongoing_requests": 8.0}


def test_places_are_booked_for_as_many_replicas_as_there_may_be() -> None:
    def booked(config: Config) -> float:
        return booked_cpus(DeploymentConfig.model_validate(config))

    assert booked({"attention": {"max_replicas": 3}}) == pytest.approx(booked({}) + 0.2)
    assert booked({"autoscale": {"max_replicas": 3}}) == pytest.approx(booked({}) + 0.8)


def test_a_part_with_labels_is_placed_on_nodes_that_have_them_and_nothing_else_restarts(nano: Path) -> None:
    labels = {"moe-role": "experts"}
    config: Config = {"placement": {"experts": labels}, "experts": {"num_cpus": 2.0, "max_replicas_per_node": 1}}
    placed = deployment(nano, "experts-1", config)
    assert placed["ray_actor_options"] == {"num_cpus": 2.0, "num_gpus": 0.0, "label_selector": labels}
    assert placed["max_replicas_per_node"] == 1
    assert deployment(nano, "router", config) == deployment(nano, "router", {})
    with_cpus: Config = {"experts": {"num_cpus": 2.0}}
    assert application(nano, config).args == application(nano, with_cpus).args


def test_a_cluster_elsewhere_is_described_without_its_checkpoint() -> None:
    config = DeploymentConfig.model_validate({"model": {"checkpoint": "/models/none-here", "dtype": "bfloat16"}})
    (described,) = serve_config_of(config, runtime_dir="/run/em", secret_file="/etc/em/secret").applications
    assert described.args["secret_file"] == "/etc/em/secret"
    assert described.args["config"]["model"]["checkpoint"] == "/models/none-here"
