"""A cluster that may drop rows says so in every answer that lacks some, on both surfaces, and is not compared."""

import json
import time
import urllib.request

import pytest
from ray_cluster import started_cluster

PROMPT = "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer the slings and arrows"


def test_dropped_rows_are_in_the_answers_and_in_the_counters(tmp_path_factory: pytest.TempPathFactory) -> None:
    config = {
        "model": {"checkpoint": "embedded", "dtype": "float32", "max_model_len": 512},
        "attention": {"kv_cache_mib": 64},
        "router": {"capacity_factor": 0.5},
        "experts": {"groups": 2},
    }
    with started_cluster(tmp_path_factory.mktemp("dropping"), config) as cluster:
        done = cluster.run("generate", "--json", "--max-tokens", "4", "--temperature", "0", PROMPT)
        over_grpc = json.loads(done.stdout)["dropped_rows"]
        assert over_grpc > 0

        body = {"model": "expertmesh-nano", "prompt": PROMPT, "max_tokens": 4, "temperature": 0}
        request = urllib.request.Request(
            f"{cluster.http}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        answer = json.load(urllib.request.urlopen(request, timeout=60))
        assert answer["expertmesh"] == {"dropped_rows": over_grpc}

        time.sleep(3)  # members report once a second
        (router,) = cluster.members("router")
        assert int(router["dropped_rows"]) == 2 * over_grpc
        assert int(router["rows"]) > int(router["dropped_rows"])

        refused = cluster.run("parity", "--prompts", "1", "--tokens", "1")
        assert refused.returncode == 1
        assert "capacity_factor" in refused.stderr
