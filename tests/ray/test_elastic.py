"""Expert groups that get copies and give them back while requests run, and a config that changes under them."""

from pathlib import Path

import yaml
from elastic import give, group_status, requests, wait_for_copies
from ray_cluster import Cluster

PROMPT = [21, 22, 23, 24, 25]
TOKENS = 64
HOT_TOKEN = 3662  # of the embedded checkpoint: a prompt of nothing else sends all its rows to group 1, and none to 0
HOT_GROUP = 1


def others_pids(cluster: Cluster) -> set[int]:
    """Of every member but the hot group's copies."""
    members = cluster.status()["controller"]["members"]
    return {member["pid"] for member in members if member.get("group") != HOT_GROUP}


def test_a_hot_group_gets_a_copy_and_gives_it_back_and_no_request_notices(
    cluster: Cluster, config: dict, tmp_path: Path
) -> None:
    others = others_pids(cluster)
    give(cluster, tmp_path / "up.yaml", config | {"autoscale": config["autoscale"] | {"max_replicas": 2}})

    def hot() -> list[int]:
        return cluster.generate([HOT_TOKEN] * 300, 1)

    with requests(hot, hot(), streams=4):
        status = wait_for_copies(cluster, HOT_GROUP, 2)
    assert "1 -> 2" in status["last_change"]
    assert group_status(cluster, 0)["copies"] == 1
    assert f"{HOT_GROUP:<14}2 of 2" in cluster.run("status").stdout
    status = wait_for_copies(cluster, HOT_GROUP, 1)
    assert "2 -> 1" in status["last_change"]
    assert others_pids(cluster) == others


def test_every_group_gets_a_second_copy_and_loses_it_again_under_running_streams(
    cluster: Cluster, config: dict, tmp_path: Path
) -> None:
    expected = cluster.generate(PROMPT, TOKENS)
    engines = cluster.engine_pids()
    with requests(lambda: cluster.generate(PROMPT, TOKENS), expected, streams=2):
        give(cluster, tmp_path / "two.yaml", config | {"experts": {"groups": 4, "replicas": 2}})
        for group in range(4):
            wait_for_copies(cluster, group, 2)
        give(cluster, tmp_path / "one.yaml", config)
        for group in range(4):
            wait_for_copies(cluster, group, 1)
    assert cluster.engine_pids() == engines


def test_what_cannot_change_in_a_running_cluster_is_refused_by_name(
    cluster: Cluster, config: dict, tmp_path: Path
) -> None:
    file = tmp_path / "other.yaml"
    file.write_text(yaml.safe_dump(config | {"experts": {"groups": 2}}))
    done = cluster.run("up", "--config", str(file))
    assert done.returncode == 1
    assert "experts.groups from 4 to 2" in done.stderr
    assert "Traceback" not in done.stderr
