"""What `expertmesh generate` shows of an answer, over a gRPC server that is played."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from cluster.proto.expertmesh.v1 import inference_pb2 as pb
from cluster.proto.expertmesh.v1 import inference_pb2_grpc as pb_grpc
from deploy.show import generate


class Servicer(pb_grpc.InferenceServicer):
    dropped_rows = 0

    def GenerateStream(self, request: pb.GenerateRequest, context: object) -> Iterator[pb.GenerateChunk]:
        yield pb.GenerateChunk(text="on", token_ids=[1])
        yield pb.GenerateChunk(text="ce", token_ids=[2], finish_reason="length", dropped_rows=self.dropped_rows)


@pytest.fixture
def servicer() -> Servicer:
    return Servicer()


@pytest.fixture
def address(servicer: Servicer) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(1))
    pb_grpc.add_InferenceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait(5)


def shown(address: str, *, as_json: bool) -> int:
    return generate(address, "x", max_tokens=2, temperature=0.0, seed=None, as_json=as_json)


@pytest.mark.parametrize("dropped_rows", [0, 12])
def test_the_json_object_says_how_many_rows_were_dropped(
    servicer: Servicer, address: str, capsys: pytest.CaptureFixture[str], dropped_rows: int
) -> None:
    servicer.dropped_rows = dropped_rows
    assert shown(address, as_json=True) == 0
    out, err = capsys.readouterr()
    assert not err
    assert json.loads(out) == {
        "prompt": "x",
        "text": "once",
        "token_ids": [1, 2],
        "finish_reason": "length",
        "dropped_rows": dropped_rows,
    }


@pytest.mark.parametrize(("dropped_rows", "lines"), [(0, 0), (12, 1)])
def test_a_text_is_followed_by_one_line_of_warning_where_rows_were_dropped(
    servicer: Servicer, address: str, capsys: pytest.CaptureFixture[str], dropped_rows: int, lines: int
) -> None:
    servicer.dropped_rows = dropped_rows
    assert shown(address, as_json=False) == 0
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("once\n", lines)
    assert not lines or "12 rows were dropped" in err
