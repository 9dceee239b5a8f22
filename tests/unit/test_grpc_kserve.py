"""The KServe service on a real gRPC server, driven by Triton's own client, over an engine that only pretends."""

import asyncio
import json
import queue
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import grpc
import grpc.aio
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from gateway_fakes import CONTEXT, write_model
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException
from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.renderers import BaseRenderer, renderer_from_config
from vllm.sampling_params import RequestOutputKind, SamplingParams

from cluster import grpc_kserve_stream
from cluster.gateway_generate import Generations
from cluster.gateway_health import DeploymentHealth, Health
from cluster.gateway_load import OpenRequests
from cluster.gateway_vllm import vllm_config_of
from cluster.grpc_bridge import Bridge, BridgeServer
from cluster.grpc_kserve import KSERVE, KServe, ServedModel
from cluster.validate import Limits
from experts.errors import GroupUnavailable

pb = cast("ModuleType", service_pb2)
SECRET = "secret at /etc/passwd"
NOT_OFFERED = (
    "RepositoryModelLoad",
    "RepositoryModelUnload",
    "SystemSharedMemoryStatus",
    "SystemSharedMemoryRegister",
    "SystemSharedMemoryUnregister",
    "CudaSharedMemoryStatus",
    "CudaSharedMemoryRegister",
    "CudaSharedMemoryUnregister",
    "TraceSetting",
    "LogSettings",
)


class Engine:
    """Says `words` for each choice, the next choice one word less; waits before each word until `gate` is open."""

    def __init__(self) -> None:
        self.words = ["a", "b", "c"]
        self.then: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.open = 0
        self.most_open = 0
        self.aborted = 0
        self.dropped_rows = 0
        self.seen: list[SamplingParams] = []

    async def generate(
        self, prompt: Mapping[str, object], params: SamplingParams, request_id: str
    ) -> AsyncGenerator[RequestOutput, None]:
        self.seen.append(params)
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        ids = cast("list[int]", prompt["prompt_token_ids"])
        try:
            async for choices, is_last in self._choices(params):
                yield RequestOutput(request_id, None, ids, None, choices, is_last and self.then is None)
            if self.then is not None:
                raise self.then
        except (asyncio.CancelledError, GeneratorExit):
            self.aborted += 1
            raise
        finally:
            self.open -= 1

    async def _choices(self, params: SamplingParams) -> AsyncIterator[tuple[list[CompletionOutput], bool]]:
        said = [self.words[: len(self.words) - i] for i in range(params.n)]
        for i in range(len(self.words)):
            await self.gate.wait()
            await asyncio.sleep(0)
            for index, words in enumerate(said):
                is_last = i + 1 == len(self.words) and index == sum(len(words) > i for words in said) - 1
                if i < len(words) and params.output_kind is RequestOutputKind.DELTA:
                    yield [self._choice(params, index, words[i : i + 1], i + 1, i + 1 == len(words))], is_last
        if params.output_kind is not RequestOutputKind.DELTA and self.then is None:
            yield [self._choice(params, i, words, len(words), True) for i, words in enumerate(said)], True

    def _choice(
        self, params: SamplingParams, index: int, words: Sequence[str], num_so_far: int, is_last: bool
    ) -> CompletionOutput:
        tokens = [ord(word[0]) for word in words]
        tell = params.logprobs is not None
        return CompletionOutput(
            index=index,
            text="".join(words),
            token_ids=tokens,
            cumulative_logprob=-0.5 * num_so_far if tell else None,
            logprobs=[{token: Logprob(-0.5, 1, chr(token))} for token in tokens] if tell else None,
            finish_reason="length" if is_last else None,
            routed_experts=np.array([self.dropped_rows]) if is_last and self.dropped_rows else None,
        )


@dataclass
class Served:
    """A server with the service, and what is behind it."""

    service: KServe
    engine: Engine
    address: str
    replicas: dict[str, dict[str, int]]
    drains: list[bool] = field(default_factory=list)


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> BaseRenderer:
    folder: Path = tmp_path_factory.mktemp("model")
    write_model(folder)
    return renderer_from_config(vllm_config_of(str(folder), "nano", dtype="float32", max_model_len=CONTEXT))


@pytest.fixture
async def served(renderer: BaseRenderer) -> AsyncIterator[Served]:
    engine = Engine()
    replicas = {"attention": {"RUNNING": 1}}
    drains: list[bool] = []

    async def deployments() -> dict[str, DeploymentHealth]:
        return {name: DeploymentHealth(status="HEALTHY", replicas=states) for name, states in replicas.items()}

    generations = Generations(
        engine=engine,
        renderer=renderer,
        limits=Limits(max_model_len=CONTEXT, vocab_size=259),
        served_name="nano",
        default_sampling={},
        request_timeout_s=30.0,
    )
    service = KServe(
        generations=generations,
        health=Health(deployments, is_draining=lambda: bool(drains), max_age_s=0.0),
        load=OpenRequests(100),
        model=ServedModel(name="nano", max_model_len=CONTEXT, server_version="1.2"),
    )
    bridge = Bridge(asyncio.get_running_loop(), ())
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(service, bridge)
    server = BridgeServer(bridge, [("grpc.max_receive_message_length", 1 << 20)])
    port = server.start("127.0.0.1:0")
    yield Served(service, engine, f"127.0.0.1:{port}", replicas, drains)
    await within_a_second(lambda: engine.open == 0 and service.load.count == 0)
    await server.stop(0.0)


@pytest.fixture
async def client(served: Served) -> AsyncIterator[Any]:
    async with triton_aio.InferenceServerClient(served.address) as client:
        yield client


async def within_a_second(is_so: Callable[[], bool], *, timeout_s: float = 1.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not is_so():  # noqa: ASYNC110 - what is waited for sets no event
            await asyncio.sleep(0.005)


def inputs(text: str = "hello", **tensors: object) -> list[triton.InferInput]:
    """Each value as the tensor that its type asks for."""
    found = []
    for name, value in ({"text_input": text} | tensors).items():
        is_flag = isinstance(value, bool)
        tensor = triton.InferInput(name, [1], "BOOL" if is_flag else "BYTES")
        content = value if isinstance(value, str | bool) else json.dumps(value)
        tensor.set_data_from_numpy(np.array([content], dtype=bool if is_flag else np.object_))
        found.append(tensor)
    return found


def a_request(text: str = "hello", *, request_id: str = "", **tensors: object) -> Any:
    """The message that tritonclient would send."""
    request = pb.ModelInferRequest(model_name="nano", id=request_id)
    for tensor in inputs(text, **tensors):
        request.inputs.append(tensor._get_tensor())
        request.raw_input_contents.append(tensor._get_content())
    return request


def texts(result: Any, name: str = "text_output") -> list[str]:
    return [element.decode() for element in result.as_numpy(name)]


def status_of(error: BaseException) -> str:
    assert isinstance(error, InferenceServerException)
    return str(error.status()).removeprefix("StatusCode.")


async def refusal(call: Any) -> InferenceServerException:
    with pytest.raises(InferenceServerException) as refused:
        await call
    assert SECRET not in str(refused.value)
    return refused.value


async def stream(
    client: Any, *requests: dict[str, Any], headers: dict[str, str] | None = None
) -> list[tuple[Any, InferenceServerException | None]]:
    """All answers to requests that are sent at once."""

    async def send() -> AsyncIterator[dict[str, Any]]:
        for request in requests:
            yield {"model_name": "nano"} | request

    return [answer async for answer in client.stream_infer(send(), headers=headers)]


def is_final(result: Any) -> bool:
    return result.get_response().parameters["triton_final_response"].bool_param


async def test_the_server_tells_that_it_lives_and_is_ready(served: Served, client: Any) -> None:
    assert await client.is_server_live() and await client.is_server_ready() and await client.is_model_ready("nano")
    assert await client.is_model_ready("nano", "1")
    assert not await client.is_model_ready("other")
    assert not await client.is_model_ready("nano", "2")
    served.replicas["experts-0"] = {"STARTING": 1}
    assert await client.is_server_live() and not await client.is_server_ready()
    assert not await client.is_model_ready("nano")


async def test_a_draining_gateway_is_not_ready_and_takes_no_requests(served: Served, client: Any) -> None:
    served.drains.append(True)
    assert await client.is_server_live() and not await client.is_server_ready()
    assert status_of(await refusal(client.infer("nano", inputs()))) == "UNAVAILABLE"


async def test_the_metadata_declares_every_tensor(client: Any) -> None:
    server = await client.get_server_metadata(as_json=True)
    assert (server["name"], server["version"]) == ("expertmesh", "1.2")
    model = await client.get_model_metadata("nano", as_json=True)
    assert (model["name"], model["versions"], model["platform"]) == ("nano", ["1"], "vllm")
    assert model["inputs"][0] == {"name": "text_input", "datatype": "BYTES", "shape": ["1"]}
    assert {tensor["name"]: tensor["shape"] for tensor in model["outputs"]}["text_output"] == ["-1"]
    config = (await client.get_model_config("nano", as_json=True))["config"]
    assert (config["backend"], config["model_transaction_policy"]) == ("vllm", {"decoupled": True})
    assert [tensor["name"] for tensor in config["input"] if not tensor.get("optional")] == ["text_input"]
    assert config["output"][2] == {"name": "cumulative_logprob", "data_type": "TYPE_FP32", "dims": ["-1"]}


async def test_the_index_has_the_model_and_its_state(served: Served, client: Any) -> None:
    assert await client.get_model_repository_index(as_json=True) == {
        "models": [{"name": "nano", "version": "1", "state": "READY"}]
    }
    served.replicas["attention"] = {}
    index = await client.get_model_repository_index(as_json=True)
    assert index["models"][0]["state"] == "UNAVAILABLE"


@pytest.mark.parametrize("method", ["get_model_metadata", "get_model_config", "get_inference_statistics"])
async def test_an_unknown_model_is_not_found(client: Any, method: str) -> None:
    for name, version in (("other", ""), ("nano", "2")):
        assert status_of(await refusal(getattr(client, method)(name, version))) == "NOT_FOUND"
        assert status_of(await refusal(client.infer(name, inputs(), model_version=version))) == "NOT_FOUND"


async def test_what_is_not_offered_is_unimplemented(served: Served) -> None:
    async with grpc.aio.insecure_channel(served.address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for name in NOT_OFFERED:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await getattr(stub, name)(getattr(pb, f"{name}Request")())
            assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
            assert "not offered" in (refused.value.details() or "")
        served_names = {method.name for method in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods}
        assert all(name in vars(KServe) for name in served_names)
    assert KSERVE == "inference.GRPCInferenceService"


async def test_a_whole_answer_begins_with_the_prompt_unless_told_otherwise(
    client: Any,
) -> None:
    result = await client.infer("nano", inputs("Say: "), request_id="r-1")
    assert texts(result) == ["Say: abc"]
    assert (result.get_response().id, result.get_response().model_version) == ("r-1", "1")
    assert texts(await client.infer("nano", inputs(exclude_input_in_output=True))) == ["abc"]


async def test_every_choice_and_every_output_is_told(client: Any) -> None:
    flags: dict[str, Any] = {
        f"return_{name}": True
        for name in ("finish_reason", "cumulative_logprob", "logprobs", "num_input_tokens", "num_output_tokens")
    }
    sampling = {"n": "2", "logprobs": "1", "temperature": "1"}
    result = await client.infer("nano", inputs(exclude_input_in_output=True, sampling_parameters=sampling, **flags))
    assert texts(result) == ["abc", "ab"]
    assert texts(result, "finish_reason") == ["length", "length"]
    assert result.as_numpy("cumulative_logprob").tolist() == [-1.5, -1.0]
    assert result.as_numpy("num_input_tokens").tolist() == [5]
    assert result.as_numpy("num_output_tokens").tolist() == [3, 2]
    logprobs = json.loads(texts(result, "logprobs")[1])
    assert logprobs[0] == {"97": {"logprob": -0.5, "rank": 1, "decoded_token": "a"}}


async def test_only_outputs_that_are_asked_for_are_sent(client: Any) -> None:
    wanted = [triton.InferRequestedOutput("finish_reason")]
    result = await client.infer("nano", inputs(), outputs=wanted)
    assert [output.name for output in result.get_response().outputs] == ["finish_reason"]
    unknown = await refusal(client.infer("nano", inputs(), outputs=[triton.InferRequestedOutput("tokens")]))
    assert status_of(unknown) == "INVALID_ARGUMENT" and "tokens" in str(unknown)


async def test_sampling_reaches_the_engine_from_the_tensor_and_from_parameters(served: Served, client: Any) -> None:
    await client.infer("nano", inputs(sampling_parameters={"temperature": "0.1", "max_tokens": "7", "stop": ["x"]}))
    await client.infer("nano", inputs(), parameters={"temperature": 0.1, "max_tokens": 7, "stop": "x"})
    await client.infer("nano", inputs())
    first, second, default = served.engine.seen
    assert (first.temperature, first.max_tokens, first.stop) == (0.1, 7, ["x"])
    assert (second.temperature, second.max_tokens, second.stop) == (0.1, 7, ["x"])
    assert (default.temperature, default.max_tokens) == (1.0, 16)


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"image": "x"}, "image"),
        ({"embedding_request": "{}"}, "embedding_request"),
        ({"stream": True}, "stream"),
        ({"text_input": ""}, "text_input"),
        ({"text_input": "x" * 2000}, "text_input"),
        ({"text_input": "x" * CONTEXT}, "64 tokens of prompt"),
        ({"sampling_parameters": {"lora_name": "x"}}, "lora_name"),
        ({"sampling_parameters": {"temperature": -1}}, "temperature"),
        ({"sampling_parameters": {"n": 17}}, "n must be"),
        ({"sampling_parameters": "nonsense"}, "sampling_parameters"),
    ],
)
async def test_a_bad_request_is_refused_by_name_and_the_next_one_is_answered(
    served: Served, client: Any, tensors: dict[str, object], named: str
) -> None:
    error = await refusal(client.infer("nano", inputs(**tensors)))  # type: ignore[arg-type]
    assert (status_of(error), named in str(error)) == ("INVALID_ARGUMENT", True)
    assert texts(await client.infer("nano", inputs("x"))) == ["xabc"]
    assert len(served.engine.seen) == 1


async def test_shared_memory_is_refused(client: Any) -> None:
    tensor = triton.InferInput("text_input", [1], "BYTES")
    tensor.set_shared_memory("region", 9)
    error = await refusal(client.infer("nano", [tensor]))
    assert status_of(error) == "INVALID_ARGUMENT" and "shared_memory_" in str(
        error
    )  # region or size: a map has no order
    output = triton.InferRequestedOutput("text_output")
    output.set_shared_memory("region", 9)
    assert status_of(await refusal(client.infer("nano", inputs(), outputs=[output]))) == "INVALID_ARGUMENT"
    assert status_of(await refusal(client.register_system_shared_memory("r", "/r", 9))) == "UNIMPLEMENTED"


async def test_a_message_over_the_servers_limit_is_refused(client: Any) -> None:
    assert status_of(await refusal(client.infer("nano", inputs("x" * (1 << 21))))) == "RESOURCE_EXHAUSTED"


@pytest.mark.parametrize(
    ("error", "status"),
    [(GroupUnavailable("no live copy of group 1"), "UNAVAILABLE"), (ValueError(SECRET), "INTERNAL")],
)
async def test_an_engines_error_is_typed(served: Served, client: Any, error: Exception, status: str) -> None:
    served.engine.then = error
    assert status_of(await refusal(client.infer("nano", inputs()))) == status
    answers = await stream(client, {"inputs": inputs(stream=True), "request_id": "r"})
    assert [texts(result)[0] for result, error in answers if error is None] == ["a", "b", "c"]
    assert SECRET not in str(answers[-1][1])
    ended = client.stream_infer(one({"inputs": inputs()}), headers={"triton_grpc_error": "true"})
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await anext(aiter(ended))
    assert failed.value.code().name == status


async def one(request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    yield {"model_name": "nano"} | request


async def test_a_full_gateway_refuses_at_once(served: Served, client: Any) -> None:
    served.service.load.limit = 0
    began_s = time.monotonic()
    assert status_of(await refusal(client.infer("nano", inputs()))) == "RESOURCE_EXHAUSTED"
    assert time.monotonic() - began_s < 0.5
    [(_, error)] = await stream(client, {"inputs": inputs()})
    assert "retry after 1 s" in str(error)


async def test_the_smallest_deadline_counts(served: Served, client: Any) -> None:
    served.engine.gate.clear()
    assert status_of(await refusal(client.infer("nano", inputs(), timeout=50_000))) == "DEADLINE_EXCEEDED"
    assert status_of(await refusal(client.infer("nano", inputs(), client_timeout=0.05))) == "DEADLINE_EXCEEDED"
    headers = {"x-request-timeout-ms": "50"}
    assert status_of(await refusal(client.infer("nano", inputs(), headers=headers))) == "DEADLINE_EXCEEDED"
    [(_, error)] = await stream(client, {"inputs": inputs(), "timeout": 50_000})
    assert "deadline" in str(error)
    await within_a_second(lambda: served.engine.open == 0)
    assert served.engine.aborted == len(served.engine.seen)


async def test_dropped_rows_are_told_with_the_last_message(served: Served, client: Any) -> None:
    served.engine.dropped_rows = 12
    result = await client.infer("nano", inputs())
    assert result.get_response().parameters["dropped_rows"].int64_param == 12
    answers = await stream(client, {"inputs": inputs(stream=True)})
    assert ["dropped_rows" in result.get_response().parameters for result, _ in answers] == [False, False, True]


async def test_a_stream_tells_only_new_text_and_marks_its_end(client: Any) -> None:
    flags: dict[str, Any] = {"return_finish_reason": True, "return_num_output_tokens": True}
    answers = await stream(client, {"inputs": inputs(stream=True, **flags), "request_id": "r"})
    results = [result for result, error in answers if error is None]
    assert [texts(result) for result in results] == [["a"], ["b"], ["c"]]
    assert [texts(result, "finish_reason")[0] for result in results] == ["None", "None", "length"]
    assert [result.as_numpy("num_output_tokens").tolist() for result in results] == [[1], [1], [1]]
    assert [is_final(result) for result in results] == [False, False, True]
    assert {result.get_response().id for result in results} == {"r"}


async def test_a_stream_of_several_choices_has_an_element_for_each(client: Any) -> None:
    [*answers] = await stream(client, {"inputs": inputs(streaming=True, sampling_parameters={"n": 2, "seed": 1})})
    assert [texts(result) for result, _ in answers] == [["a", ""], ["", "a"], ["b", ""], ["", "b"], ["c", ""]]


async def test_without_the_stream_tensor_a_stream_carries_one_whole_answer(
    client: Any,
) -> None:
    [(result, error)] = await stream(client, {"inputs": inputs("x"), "request_id": "r"})
    assert error is None and is_final(result) and texts(result) == ["xabc"]


async def test_requests_on_one_stream_run_side_by_side(served: Served, client: Any) -> None:
    requests = [{"inputs": inputs(stream=True), "request_id": f"r{i}"} for i in range(8)]
    served.engine.gate.clear()
    answering = asyncio.create_task(stream(client, *requests))
    await within_a_second(lambda: served.engine.open == 8)
    served.engine.gate.set()
    answers = await answering
    ids = [result.get_response().id for result, _ in answers]
    assert len(ids) == 24 and len(set(ids[:8])) > 1  # they interleave
    for i in range(8):
        assert [texts(result)[0] for result, _ in answers if result.get_response().id == f"r{i}"] == ["a", "b", "c"]


async def test_a_stream_has_so_many_open_requests_and_answers_all(served: Served, client: Any) -> None:
    served.engine.gate.clear()
    num = grpc_kserve_stream.MAX_OPEN + 30
    answering = asyncio.create_task(stream(client, *({"inputs": inputs(), "request_id": f"r{i}"} for i in range(num))))
    await within_a_second(lambda: served.engine.open == grpc_kserve_stream.MAX_OPEN)
    served.engine.gate.set()
    answers = await answering
    assert served.engine.most_open == grpc_kserve_stream.MAX_OPEN
    assert {result.get_response().id for result, _ in answers} == {f"r{i}" for i in range(num)}


async def test_a_bad_request_leaves_the_others_of_its_stream_alone(served: Served) -> None:
    async with grpc.aio.insecure_channel(served.address) as channel:
        call = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer()
        await call.write(a_request(request_id="good", stream=True))
        await call.write(a_request(request_id="bad", image="x"))
        await call.write(pb.ModelInferRequest(model_name="other", id="x" * 1000))
        await call.write(a_request(request_id="after"))
        await call.done_writing()
        answers = [answer async for answer in call]
    errors = {answer.infer_response.id: answer for answer in answers if answer.error_message}
    assert set(errors) == {"bad", "x" * 128}
    assert "image" in errors["bad"].error_message
    assert errors["bad"].infer_response.parameters["triton_final_response"].bool_param
    assert [answer.infer_response.id for answer in answers if not answer.error_message].count("good") == 3
    assert "after" in [answer.infer_response.id for answer in answers]


async def test_a_client_that_wants_a_status_gets_it_and_loses_its_stream(served: Served, client: Any) -> None:
    served.engine.gate.clear()
    requests = ({"inputs": inputs(stream=True)}, {"inputs": inputs(image="x")})
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await stream(client, *requests, headers={"triton_grpc_error": "true"})
    assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "image" in (failed.value.details() or "")
    await within_a_second(lambda: served.engine.open == 0)


async def test_leaving_aborts_what_the_stream_had_open(served: Served) -> None:
    """The synchronous client, as most use it: requests are abandoned with the stream."""
    served.engine.gate.clear()
    client = await asyncio.to_thread(triton.InferenceServerClient, served.address)
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    await asyncio.to_thread(client.start_stream, lambda result, error: answers.put((result, error)))
    for _ in range(5):
        client.async_stream_infer("nano", inputs(stream=True))
    await within_a_second(lambda: served.engine.open == 5)
    await asyncio.to_thread(client.stop_stream, cancel_requests=True)
    await within_a_second(lambda: served.engine.open == 0)
    assert served.engine.aborted == 5
    assert status_of(answers.get(timeout=1)[1]) == "CANCELLED"
    client.close()


async def test_a_half_closed_stream_is_answered_to_its_end(served: Served) -> None:
    served.engine.gate.clear()
    client = await asyncio.to_thread(triton.InferenceServerClient, served.address)
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    await asyncio.to_thread(client.start_stream, lambda result, error: answers.put((result, error)))
    for i in range(3):
        client.async_stream_infer("nano", inputs(stream=True), request_id=f"r{i}", enable_empty_final_response=True)
    stopping = asyncio.create_task(asyncio.to_thread(client.stop_stream))
    await within_a_second(lambda: served.engine.open == 3)
    served.engine.gate.set()
    await stopping
    found = [answers.get_nowait() for _ in range(9)]
    assert answers.empty() and all(error is None for _, error in found)
    client.close()


async def test_a_cancelled_unary_call_is_aborted(served: Served) -> None:
    served.engine.gate.clear()
    async with grpc.aio.insecure_channel(served.address) as channel:
        call = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(a_request())
        await within_a_second(lambda: served.engine.open == 1)
        call.cancel()
        await within_a_second(lambda: served.engine.open == 0)
    assert served.engine.aborted == 1


async def test_a_client_that_does_not_read_stops_its_requests_and_loses_its_stream(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_kserve_stream, "WRITE_TIMEOUT_S", 0.3)
    served.engine.words = ["x" * 10_000] * 100_000
    options = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
    async with grpc.aio.insecure_channel(served.address, options=options) as channel:
        call = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer()
        await call.write(a_request(stream=True))
        await call.write(a_request(stream=True))
        await within_a_second(lambda: served.engine.aborted == 2, timeout_s=10.0)
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            assert len([answer async for answer in call]) < 1000
    assert failed.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "not read" in (failed.value.details() or "")


async def test_what_is_no_message_ends_its_stream_with_a_status(served: Served) -> None:
    served.engine.gate.clear()
    async with grpc.aio.insecure_channel(served.address) as channel:
        call = channel.stream_stream(f"/{KSERVE}/ModelStreamInfer")()
        await call.write(a_request(stream=True).SerializeToString())
        await call.write(b"\xff\xff\xff")
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await anext(aiter(call))
    assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_the_statistics_count_what_was_answered_and_what_was_not(
    client: Any,
) -> None:
    await client.infer("nano", inputs())
    await stream(client, {"inputs": inputs(stream=True)}, {"inputs": inputs(image="x")})
    stats = (await client.get_inference_statistics("nano")).model_stats[0]
    assert (stats.name, stats.version, stats.inference_count, stats.execution_count) == ("nano", "1", 2, 2)
    counts = stats.inference_stats
    assert (counts.success.count, counts.fail.count, counts.compute_infer.count) == (2, 1, 2)
    assert counts.success.ns == counts.compute_input.ns + counts.compute_infer.ns > 0
    assert abs(stats.last_inference / 1000 - time.time()) < 60
    assert len((await client.get_inference_statistics()).model_stats) == 1
