"""A cluster that may drop rows says so in every answer that lacks some, on both surfaces."""

import json
import time
import urllib.request

import grpc
import pytest
from ray_cluster import started_cluster

from cluster.proto.expertmesh.v1 import inference_pb2 as pb
from cluster.proto.expertmesh.v1 import inference_pb2_grpc as pb_grpc

PROMPT = "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer the slings and arrows"


def test_dropped_rows_are_in_the_answers_and_in_the_counters(tmp_path_factory: pytest.TempPathFactory) -> None:
    config = {
        "model": {"checkpoint": "embedded", "dtype": "float32", "max_model_len": 512},
        "attention": {"kv_cache_mib": 64},
        "router": {"capacity_factor": 0.5},
        "experts": {"groups": 2},
    }
    with started_cluster(tmp_path_factory.mktemp("dropping"), config) as cluster:
        asked = pb.GenerateRequest(prompt=PROMPT, max_tokens=4, temperature=0)
        with grpc.insecure_channel(cluster.grpc) as channel:
            over_grpc = pb_grpc.InferenceStub(channel).Generate(asked, timeout=60).dropped_rows
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
