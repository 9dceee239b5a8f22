"""The Serve config of overlay dev-cpu, deployed by `serve deploy` on raylets with the labels of the worker groups."""

import json
import secrets
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import yaml
from labelled_nodes import Node, Nodes, started_nodes
from ray_cluster import ROOT, free_port

from cluster.proto.expertmesh.v1 import inference_pb2 as pb
from cluster.proto.expertmesh.v1 import inference_pb2_grpc as pb_grpc
from deploy.render import render
from experts.handshake import write_secret

OVERLAY = ROOT / "k8s/overlays/dev-cpu"
KEY = secrets.token_urlsafe(32)
READY_TIMEOUT_S = 300.0


class Deployed:
    """The application on labelled raylets."""

    def __init__(self, nodes: Nodes, *, http_port: int, grpc_port: int) -> None:
        self.nodes = nodes
        self.http, self.grpc = f"http://127.0.0.1:{http_port}", f"127.0.0.1:{grpc_port}"

    def status(self) -> dict:
        request = urllib.request.Request(f"{self.http}/expertmesh/status", headers={"Authorization": f"Bearer {KEY}"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def applications(self) -> dict:
        """What Serve's own page says of them."""
        token = Path(self.nodes.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
        request = urllib.request.Request(
            f"{self.nodes.dashboard}/api/serve/applications/", headers={"Authorization": f"Bearer {token}"}
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)["applications"]

    def labels_of_nodes(self) -> dict[str, str]:
        """Of each raylet, its role."""
        listed = json.loads(self.nodes.run("ray", "list", "nodes", "--format=json", "--detail"))
        return {node["node_id"]: node["labels"]["moe-role"] for node in listed}

    def wait_until_ready(self) -> None:
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        while True:
            try:
                with urllib.request.urlopen(f"{self.http}/ready", timeout=10):
                    return
            except OSError:
                assert time.monotonic() < deadline_s, json.dumps(self.applications(), indent=1)[:6000]
                time.sleep(1)


def here(text: str, replacements: dict[str, str]) -> str:
    """The Serve config with the folders and ports of this machine in the place of a pod's."""
    config = yaml.safe_load(text)
    whole = json.dumps(config)
    for old, new in replacements.items():
        assert old in whole, f"{old} is not in the Serve config of {OVERLAY.name}"
        whole = whole.replace(old, new)
    return yaml.safe_dump(json.loads(whole))


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    folder = tmp_path_factory.mktemp("em")
    write_secret(folder / "link")
    (folder / "keys").write_text(KEY)
    (folder / "keys").chmod(0o600)
    http_port, grpc_port, metrics_port = free_port(), free_port(), free_port()
    text = (OVERLAY / "serve-config.yaml").read_text()
    config = here(
        text,
        {
            '"/run/expertmesh"': json.dumps(str(folder)),
            '"/etc/expertmesh/link/secret"': json.dumps(str(folder / "link")),
            '"/etc/expertmesh/keys/keys"': json.dumps(str(folder / "keys")),
            '"http_port": 8000': f'"http_port": {http_port}',
            '"grpc_port": 9000': f'"grpc_port": {grpc_port}',
            '"port": 9464': f'"port": {metrics_port}',
            "0.0.0.0": "127.0.0.1",
        },
    )
    (folder / "serve.yaml").write_text(config)
    with started_nodes(folder, groups_of_overlay()) as running:
        found = Deployed(running, http_port=http_port, grpc_port=grpc_port)
        running.run("serve", "deploy", str(folder / "serve.yaml"), "--address", running.dashboard)
        found.wait_until_ready()
        yield found


def groups_of_overlay() -> list[Node]:
    """The pods of the overlay's worker groups, as raylets."""
    documents = yaml.safe_load_all(render(OVERLAY.name))
    (service,) = (document for document in documents if document["kind"] == "RayService")
    return [
        Node(role=group["labels"]["moe-role"], num_cpus=int(container["resources"]["limits"]["cpu"]))
        for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
        for container in group["template"]["spec"]["containers"][:1]
        for _ in range(group["replicas"])
    ]


def test_every_replica_runs_on_a_node_with_the_label_of_its_part(deployed: Deployed) -> None:
    status, roles = deployed.status(), deployed.labels_of_nodes()
    assert set(roles.values()) == {"head", "gateway", "attention", "experts"}
    members = {member["member_id"]: member for member in status["controller"]["members"]}
    assert {member["kind"] for member in members.values()} == {"router", "attention", "experts"}
    for member in members.values():
        wanted = "experts" if member["kind"] == "experts" else "attention"
        assert roles[member["node_id"]] == wanted, member
    placed = [member["node_id"] for member in members.values() if member["kind"] == "experts"]
    assert len(placed) == len(set(placed)), "two copies of an expert group are on one node"
    for name in ("gateway", "controller"):
        (replica,) = deployed.applications()["expertmesh"]["deployments"][name]["replicas"]
        assert roles[replica["node_id"]] == "gateway"


def test_it_answers_whom_it_knows(deployed: Deployed) -> None:
    request = pb.GenerateRequest(prompt="Once upon a time", max_tokens=8, temperature=0)
    with grpc.insecure_channel(deployed.grpc) as channel:
        stub = pb_grpc.InferenceStub(channel)
        with pytest.raises(grpc.RpcError) as refused:
            stub.Generate(request, timeout=60)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED  # type: ignore[attr-defined]
        answer = stub.Generate(request, timeout=60, metadata=[("authorization", f"Bearer {KEY}")])
    assert len(answer.token_ids) == 8
