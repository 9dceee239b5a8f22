"""What vllm.grpc.engine.VllmEngine tells of the model, of its load, and of the tokenizer."""

import hashlib
import io
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
import pytest
from gateway_fakes import CONFIG, CONTEXT
from smg_grpc_proto.generated import common_pb2
from smg_grpc_proto.generated import vllm_engine_pb2 as pb
from transformers import AutoTokenizer
from vllm_engine_fakes import Model, Served, asked, model_in, rest_of, serving

from cluster.vllm_engine_info import CHUNK_BYTES, tokenizer_archive_of


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return model_in(tmp_path_factory.mktemp("model"))


@pytest.fixture
async def served(model: Model) -> AsyncIterator[Served]:
    async with serving(model) as found:
        yield found


async def test_health_follows_the_cluster(served: Served) -> None:
    async def health() -> tuple[bool, str]:
        answer = await served.stub.HealthCheck(pb.HealthCheckRequest())
        return answer.healthy, answer.message

    assert await health() == (True, "ready")
    served.replicas["RUNNING"] = 0
    assert await health() == (False, "no running replica of attention")
    served.replicas["LOST"] = 1
    assert (await health())[0] is False
    del served.replicas["LOST"]
    served.replicas["RUNNING"] = 1
    served.draining[0] = True
    assert (await health())[0] is False


async def test_the_model_is_told_as_the_gateway_needs_it(served: Served, model: Model) -> None:
    info = await served.stub.GetModelInfo(pb.GetModelInfoRequest())
    assert info == pb.GetModelInfoResponse(
        model_path=str(model.folder),
        tokenizer_path=str(model.folder),
        served_model_name="nano",
        is_generation=True,
        max_context_length=CONTEXT,
        max_req_input_len=CONTEXT - 1,
        vocab_size=259,
        model_type="deepseek_v2",
        architectures=["DeepseekV2ForCausalLM"],
        eos_token_ids=[258],
        bos_token_id=257,
        default_sampling_params_json='{"temperature":0.25,"top_k":3}',
    )
    assert (CONFIG["eos_token_id"], CONFIG["bos_token_id"]) == (258, 257)


async def test_load_and_server_count_the_open_requests(served: Served) -> None:
    served.engine.delay_s = 0.05
    call = served.stub.Generate(asked(stream=True))
    await call.read()
    server = await served.stub.GetServerInfo(pb.GetServerInfoRequest())
    assert (server.server_type, server.data_parallel_size, server.max_num_seqs, server.active_requests) == (
        "vllm-grpc",
        1,
        8,
        1,
    )
    assert server.uptime_seconds > 0
    loads = await served.stub.GetLoads(pb.GetLoadsRequest(dp_rank=3, include=["core"]))
    assert (loads.dp_rank_count, loads.loads[0].num_running_reqs, loads.loads[0].utilization) == (1, 1, 0.125)
    assert await rest_of(call)
    idle = await served.stub.GetLoads(pb.GetLoadsRequest())
    assert [load.num_total_reqs for load in idle.loads] == [0]
    assert idle.timestamp


async def test_the_tokenizer_arrives_whole_and_works(served: Served, tmp_path: Path) -> None:
    chunks = [chunk async for chunk in served.stub.GetTokenizer(common_pb2.GetTokenizerRequest())]
    data = b"".join(chunk.data for chunk in chunks)
    assert [chunk.sha256 for chunk in chunks] == [""] * (len(chunks) - 1) + [hashlib.sha256(data).hexdigest()]
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        archive.extractall(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello"
    assert tokenizer.chat_template


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    inside = tmp_path / "model"
    inside.mkdir()
    (inside / "tokenizer.json").write_bytes(bytes(range(256)) * 8)
    return inside


def names_in(folder: Path) -> list[str]:
    tokenizer_archive_of.cache_clear()
    archive = tokenizer_archive_of(str(folder))
    assert archive is not None
    return zipfile.ZipFile(io.BytesIO(archive.data)).namelist()


def test_only_the_tokenizers_files_are_sent(folder: Path) -> None:
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).write_text("{}")
    for name in ("chat_template.jinja", "model.safetensors", "secret.json", "tokenizer.model", ".env"):
        (folder / name).write_text("x")
    (folder / "more.jinja").mkdir()
    assert names_in(folder) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_a_link_is_followed_inside_the_folder_only(folder: Path) -> None:
    (folder.parent / "outside.json").write_text("secret")
    (folder / "config.json").symlink_to("../outside.json")
    (folder / "tokenizer_config.json").symlink_to("tokenizer.json")
    (folder / "a.jinja").symlink_to("nowhere")
    assert names_in(folder) == ["tokenizer.json", "tokenizer_config.json"]
    beside = folder.parent / "link"
    beside.symlink_to(folder)
    assert names_in(beside) == ["tokenizer.json", "tokenizer_config.json"]


def test_the_same_files_make_the_same_archive_in_small_chunks(folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(np.random.default_rng(0).bytes(3 * CHUNK_BYTES))  # does not get smaller
    tokenizer_archive_of.cache_clear()
    before = tokenizer_archive_of(str(folder))
    (folder / "tokenizer.json").touch()
    tokenizer_archive_of.cache_clear()
    assert before is not None and before == tokenizer_archive_of(str(folder))
    sizes = [len(chunk.data) for chunk in before.chunks()]
    assert sizes[:-1] == [CHUNK_BYTES] * 3 and 0 < sizes[-1] <= CHUNK_BYTES


async def test_a_folder_without_a_tokenizer_is_no_fault_of_ours(served: Served, tmp_path: Path) -> None:
    object.__setattr__(served.service, "checkpoint", str(tmp_path))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await served.stub.GetTokenizer(common_pb2.GetTokenizerRequest()).read()
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
