"""The doors of a running cluster: what listens, and the clients that people have beside OpenAI's."""

import json
import queue

import grpc
import numpy as np
import psutil
import pytest
from ray_cluster import Cluster
from smg_grpc_proto.generated import common_pb2, vllm_engine_pb2, vllm_engine_pb2_grpc
from sweep import Doors, run_sweep
from tritonclient.grpc import InferenceServerClient, InferInput, InferResult
from tritonclient.utils import InferenceServerException

PROMPT = "Once upon a time"
# Ray's own ports, which cannot be bound to loopback alone; each wants the cluster's token, which is in a file of ours.
ON_ALL_INTERFACES = {
    "gcs_server": "Ray's control plane",
    "raylet": "Ray's node manager and object manager",
    "python": "Ray's core workers and agents",
    "ray::": "Ray's core workers",
}


def test_what_is_ours_listens_on_loopback_only(cluster: Cluster) -> None:
    status = json.loads((cluster.home / "cluster.json").read_text())
    ours = {int(status["http"].rpartition(":")[2]), int(status["grpc"].rpartition(":")[2])}
    open_to_all: list[str] = []
    found: set[int] = set()
    for process in [psutil.Process(cluster.owner_pid), *psutil.Process(cluster.owner_pid).children(recursive=True)]:
        for connection in process.net_connections("inet"):
            if connection.status != psutil.CONN_LISTEN:
                continue
            address, port = connection.laddr
            if address in ("127.0.0.1", "::1", "::ffff:127.0.0.1"):
                found.add(port)
            elif port in ours or not process.name().startswith(tuple(ON_ALL_INTERFACES)):
                open_to_all.append(f"{process.name()} {address}:{port}")
    assert not open_to_all
    assert ours <= found


@pytest.fixture
def triton(cluster: Cluster):
    client = InferenceServerClient(cluster.grpc)
    yield client
    client.close()


def text_input(text: str) -> InferInput:
    tensor = InferInput("text_input", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([text.encode()], dtype=object))
    return tensor


def text_of(result: InferResult | None) -> str:
    assert result is not None
    found = result.as_numpy("text_output")
    assert found is not None
    return found[0].decode()


def test_tritons_client_gets_what_our_own_gets(cluster: Cluster, triton: InferenceServerClient) -> None:
    ours = json.loads(cluster.run("generate", PROMPT, "--max-tokens", "12", "--temperature", "0", "--json").stdout)
    assert triton.is_server_live() and triton.is_server_ready() and triton.is_model_ready("expertmesh-nano")
    sampling = {"max_tokens": 12, "temperature": 0.0}
    whole = triton.infer("expertmesh-nano", [text_input(PROMPT)], parameters=sampling)
    assert text_of(whole) == PROMPT + ours["text"]
    answers: queue.Queue = queue.Queue()
    triton.start_stream(lambda result, error: answers.put((result, error)))
    stream = InferInput("stream", [1], "BOOL")
    stream.set_data_from_numpy(np.array([True]))
    triton.async_stream_infer("expertmesh-nano", [text_input(PROMPT), stream], parameters=sampling)
    text, final = "", False
    while not final:
        result, error = answers.get(timeout=60)
        assert error is None
        text += text_of(result)
        final = result.get_response().parameters["triton_final_response"].bool_param
    triton.stop_stream()
    assert text == ours["text"]


def test_what_triton_offers_and_we_do_not_is_unimplemented(triton: InferenceServerClient) -> None:
    for refused in (lambda: triton.load_model("x"), triton.get_system_shared_memory_status):
        with pytest.raises(InferenceServerException) as caught:
            refused()
        assert caught.value.status() == "StatusCode.UNIMPLEMENTED"


def test_an_engines_client_sends_ids_and_gets_ids(cluster: Cluster) -> None:
    ids = [1, 2, 3, 4, 5]
    request = vllm_engine_pb2.GenerateRequest(
        request_id="ours",
        tokenized=vllm_engine_pb2.TokenizedInput(input_ids=ids),
        sampling_params=vllm_engine_pb2.SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True),
        stream=True,
    )
    with grpc.insecure_channel(cluster.grpc) as channel:
        stub = vllm_engine_pb2_grpc.VllmEngineStub(channel)
        answers = list(stub.Generate(request, timeout=60))
        info = stub.GetModelInfo(vllm_engine_pb2.GetModelInfoRequest(), timeout=30)
        archive = b"".join(chunk.data for chunk in stub.GetTokenizer(common_pb2.GetTokenizerRequest(), timeout=30))
    got = [token for answer in answers if answer.HasField("chunk") for token in answer.chunk.token_ids]
    assert list(answers[-1].complete.output_ids) == got[-len(answers[-1].complete.output_ids) :]  # the last delta again
    assert got == cluster.generate(ids, 8)
    assert info.served_model_name == "expertmesh-nano" and archive.startswith(b"PK")


def test_a_sample_of_malformed_requests_breaks_nothing(cluster: Cluster) -> None:
    """All of them are sent to a gateway in tests/unit/test_sweep.py, and to a cluster by `make clients`."""
    engines = cluster.engine_pids()
    doors = Doors(http=cluster.http.removeprefix("http://"), grpc=cluster.grpc, model="expertmesh-nano", key=None)
    result = run_sweep(doors, surfaces=("http", "grpc"), only="temperature")
    assert result.num_cases >= 40
    assert not result.failures, "\n".join(result.failures)
    assert cluster.engine_pids() == engines
