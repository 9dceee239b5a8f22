"""A cluster in bfloat16 whose steps may take two seconds: parity as defined there, and errors that come in time."""

import json
import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import grpc
import pytest
from ray_cluster import Cluster, started_cluster

STEP_TIMEOUT_S = 2
PROMPT = [21, 22, 23, 24]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    config = {
        "model": {"checkpoint": "embedded", "dtype": "bfloat16", "max_model_len": 512},
        "attention": {"kv_cache_mib": 64, "step_timeout_s": STEP_TIMEOUT_S},
        "experts": {"groups": 2},
    }
    with started_cluster(tmp_path_factory.mktemp("quick"), config) as cluster:
        yield cluster


def test_bfloat16_tokens_are_as_good_as_vllms_own(quick: Cluster) -> None:
    done = quick.run("parity", "--prompts", "16", "--tokens", "32", "--json", timeout_s=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["holds"]


def test_a_silent_group_is_a_typed_error_before_the_deadline_on_both_surfaces(quick: Cluster) -> None:
    expected = quick.generate(PROMPT, 8)
    engines = quick.engine_pids()
    (victim,) = [member["pid"] for member in quick.members("experts") if member["group"] == 1]
    os.kill(victim, signal.SIGSTOP)
    try:
        began_s = time.monotonic()
        with pytest.raises(grpc.RpcError) as over_grpc:
            quick.generate(PROMPT, 8)
        over_grpc_s = time.monotonic() - began_s
        with pytest.raises(urllib.error.HTTPError) as over_http:
            complete(quick)
    finally:
        os.kill(victim, signal.SIGCONT)
    assert over_grpc.value.code() is grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]
    assert "expert group 1" in over_grpc.value.details()  # type: ignore[attr-defined]
    assert over_grpc_s < STEP_TIMEOUT_S + 3
    assert over_http.value.code == 503
    assert over_http.value.headers["Retry-After"]
    assert "expert group 1" in json.load(over_http.value)["error"]["message"]
    assert quick.generate(PROMPT, 8) == expected
    assert quick.engine_pids() == engines


def complete(cluster: Cluster) -> None:
    body = {"model": "expertmesh-nano", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    request = urllib.request.Request(
        f"{cluster.http}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(request, timeout=30)
