"""A running cluster, used through its front doors with real clients."""

import json
import re
import subprocess
import time
import urllib.error
import urllib.request

import grpc
import openai
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from ray_cluster import Cluster

from cluster.proto.expertmesh.v1 import inference_pb2 as pb
from cluster.proto.expertmesh.v1 import inference_pb2_grpc as pb_grpc

PROMPT = [5, 6, 7, 8, 9, 10]


def shell(command: str) -> str:
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def client(cluster: Cluster) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{cluster.http}/v1", api_key="none", max_retries=0)


def test_the_printed_curl_line_works_as_printed(cluster: Cluster) -> None:
    (line,) = re.findall(r"^ +(curl .*)$", cluster.printed, re.MULTILINE)
    answer = json.loads(shell(line))
    assert answer["usage"]["completion_tokens"] == 32
    assert answer["choices"][0]["text"]


def test_the_printed_grpc_line_works_and_says_what_curl_says(cluster: Cluster) -> None:
    (line,) = re.findall(r"^ +(\S*expertmesh generate .*)$", cluster.printed, re.MULTILINE)
    (curl,) = re.findall(r"^ +(curl .*)$", cluster.printed, re.MULTILINE)
    assert shell(line).startswith(json.loads(shell(curl))["choices"][0]["text"].rstrip("\ufffd"))


def test_the_cluster_says_what_unmodified_vllm_says(cluster: Cluster) -> None:
    done = cluster.run("parity", "--prompts", "16", "--tokens", "32", "--json", timeout_s=400)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_stream_has_the_tokens_of_the_whole_answer(cluster: Cluster) -> None:
    request = pb.GenerateRequest(
        prompt_token_ids=pb.TokenIds(ids=PROMPT), max_tokens=24, temperature=0, ignore_eos=True
    )
    with grpc.insecure_channel(cluster.grpc) as channel:
        chunks = list(pb_grpc.InferenceStub(channel).GenerateStream(request, timeout=60))
    assert [token for chunk in chunks for token in chunk.token_ids] == cluster.generate(PROMPT, 24)
    assert chunks[-1].finish_reason == "length"


def test_clients_that_leave_at_once_leave_nothing_at_the_engines(cluster: Cluster) -> None:
    """The cancellation of a call that has just begun is what Ray loses now and then."""
    request = pb.GenerateRequest(
        prompt_token_ids=pb.TokenIds(ids=PROMPT), max_tokens=400, temperature=0, ignore_eos=True
    )
    with grpc.insecure_channel(cluster.grpc) as channel:
        stub = pb_grpc.InferenceStub(channel)
        for number in range(300):
            stream = stub.GenerateStream(request, timeout=60)
            time.sleep(number % 20 / 1000)
            stream.cancel()
    began_s = time.monotonic()
    while is_open := [member["requests"] for member in cluster.members("attention") if member["requests"] != "0"]:
        assert time.monotonic() - began_s < 5, f"{is_open} requests are still at engines"


def test_openai_clients_complete_chat_and_stream(cluster: Cluster) -> None:
    api = client(cluster)
    (model,) = api.models.list().data
    whole = api.completions.create(model=model.id, prompt="The quick", max_tokens=12, temperature=0)
    stream = api.completions.create(model=model.id, prompt="The quick", max_tokens=12, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream if chunk.choices) == whole.choices[0].text
    chat = api.chat.completions.create(
        model=model.id, messages=[{"role": "user", "content": "Hello"}], max_completion_tokens=8, temperature=0
    )
    assert chat.choices[0].finish_reason == "length"


def test_an_answer_keeps_to_its_schema(cluster: Cluster) -> None:
    colours = ["red", "blue"]
    schema: dict[str, object] = {"enum": colours}  # an object's grammar has white space without end
    answer = client(cluster).chat.completions.create(
        model="expertmesh-nano",
        messages=[{"role": "user", "content": "the sky?"}],
        max_completion_tokens=32,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "sky", "schema": schema, "strict": True}},
    )
    assert answer.choices[0].finish_reason == "stop"
    assert json.loads(answer.choices[0].message.content or "") in colours


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", 7), ("max_tokens", 100_000), ("top_p", 0), ("n", 1000), ("prompt", [])]
)
def test_bad_input_gets_a_400_that_names_the_field(cluster: Cluster, field: str, value: object) -> None:
    body = {"model": "expertmesh-nano", "prompt": "x", "max_tokens": 4} | {field: value}
    request = urllib.request.Request(
        f"{cluster.http}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=30)
    error = json.load(refused.value)["error"]
    assert refused.value.code == 400
    assert field in json.dumps(error)
    assert "Traceback" not in json.dumps(error)


@pytest.mark.parametrize(("field", "value"), [("temperature", 7.0), ("max_tokens", 100_000), ("top_p", 0.0)])
def test_bad_input_over_grpc_is_an_invalid_argument_that_names_the_field(
    cluster: Cluster, field: str, value: float
) -> None:
    fields = {"max_tokens": 4} | {field: value}
    request = pb.GenerateRequest(prompt="x", **fields)  # type: ignore[arg-type]
    with grpc.insecure_channel(cluster.grpc) as channel, pytest.raises(grpc.RpcError) as refused:
        pb_grpc.InferenceStub(channel).Generate(request, timeout=30)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]
    assert field in refused.value.details()  # type: ignore[attr-defined]


def test_health_and_reflection_answer(cluster: Cluster) -> None:
    with grpc.insecure_channel(cluster.grpc) as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(  # type: ignore[attr-defined]
            health_pb2.HealthCheckRequest(), timeout=30
        )
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        (listed,) = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(  # type: ignore[operator]
            iter([ask]), timeout=30
        )
    assert health.status == health_pb2.HealthCheckResponse.SERVING
    names = {service.name for service in listed.list_services_response.service}
    assert {"expertmesh.v1.Inference", "grpc.health.v1.Health"} <= names


def test_model_info_tells_the_experts_and_their_groups(cluster: Cluster) -> None:
    with grpc.insecure_channel(cluster.grpc) as channel:
        info = pb_grpc.InferenceStub(channel).ModelInfo(pb.ModelInfoRequest(), timeout=30)
    assert info.name == "expertmesh-nano"
    assert info.max_model_len == 512


def test_status_shows_every_part_and_who_holds_which_experts(cluster: Cluster) -> None:
    table = cluster.run("status").stdout
    for name in ("gateway", "controller", "router", "attention", "experts-0", "experts-3", "placement version"):
        assert name in table
    assert "group 3: experts 24 to 31 of each layer" in table
    status = json.loads(cluster.run("status", "--json").stdout)
    assert len([m for m in status["controller"]["members"] if m["kind"] == "experts"]) == 4
    assert status["controller"]["missing_groups"] == []


def test_generate_prints_json_when_asked(cluster: Cluster) -> None:
    answer = json.loads(cluster.run("generate", "--json", "--max-tokens", "5", "Hello").stdout)
    assert len(answer["token_ids"]) == 5
    assert answer["finish_reason"] == "length"


def test_both_attention_replicas_work(cluster: Cluster) -> None:
    cluster.wait_for_engines(2)
