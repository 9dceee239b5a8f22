"""The gateway without Ray: HTTP through vLLM's OpenAI server, and the RPC methods, over one fake engine."""

import json
from collections.abc import Iterator

import grpc
import pytest
from gateway_fakes import CONTEXT, FakeEngine, Front, a_front
from starlette.types import Receive, Scope, Send

from cluster.gateway_guard import ROUTES
from cluster.grpc_inference import INFERENCE
from cluster.metrics import GATEWAY
from cluster.proto.expertmesh.v1 import inference_pb2 as pb
from experts.errors import DeadlineExceeded, GroupUnavailable


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    yield from a_front(tmp_path_factory.mktemp("model"))


@pytest.fixture
def front(running: Front) -> Front:
    running.use(FakeEngine())
    running.replicas = {"attention": {"RUNNING": 1}, "experts-0": {"RUNNING": 2}}
    return running


def test_a_completion_is_answered_with_text_and_counts(front: Front) -> None:
    answer = front.post("/v1/completions", model="nano", prompt="hello", max_tokens=3).json()
    assert answer["choices"][0]["text"] == "abc"
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (5, 3)


def test_a_chat_is_rendered_with_the_checkpoints_template(front: Front) -> None:
    answer = front.post("/v1/chat/completions", messages=[{"role": "user", "content": "hi"}]).json()
    assert answer["choices"][0]["message"]["content"] == "abc"
    assert answer["usage"]["prompt_tokens"] == len("user: hi\n")


def test_a_stream_carries_only_new_text_and_ends_with_done(front: Front) -> None:
    events = front.post("/v1/completions", prompt="hello", stream=True).text.split("\n\n")
    assert [json.loads(event[6:])["choices"][0]["text"] for event in events[:3]] == ["a", "b", "c"]
    assert events[3] == "data: [DONE]"


def test_only_listed_routes_answer(front: Front) -> None:
    for path in ("/scale_elastic_ep", "/inference/v1/generate", "/invocations", "/docs", "/metrics/x", "/v1/responses"):
        answer = front.post(path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found"), path
    assert front.request("GET", "/v1/completions").status_code == 405
    assert {path for path in ROUTES if front.request("GET", path).status_code == 200} == {
        path for path, method in ROUTES.items() if method == "GET"
    }


@pytest.mark.parametrize("words", [[], ["a"]], ids=["before the first token", "after it"])
@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (GroupUnavailable("no live copy of group 1"), 503, grpc.StatusCode.UNAVAILABLE),
        (DeadlineExceeded("too late"), 504, grpc.StatusCode.DEADLINE_EXCEEDED),
        (ValueError("secret at /etc/passwd"), 500, grpc.StatusCode.INTERNAL),
    ],
)
def test_an_engines_error_is_typed_on_every_surface(
    front: Front, error: Exception, status: int, code: grpc.StatusCode, words: list[str]
) -> None:
    front.engine.words, front.engine.then = words, error
    whole = front.post("/v1/completions", prompt="hello")
    assert whole.status_code == status
    assert ("retry-after" in whole.headers) == (status == 503)
    streamed = front.post("/v1/completions", prompt="hello", stream=True)
    assert streamed.status_code == (200 if words else status)  # a stream that never began is not called one
    assert '"error"' in streamed.text
    answer, unary = front.generate(prompt="hello")
    assert (unary.code, answer) == (code, pb.GenerateResponse())
    assert unary.trailers.get("retry-after") == ("1" if status == 503 else None)
    chunks, broken = front.stream(prompt="hello")
    assert (broken.code, len(chunks)) == (code, len(words))
    assert "secret" not in whole.text + streamed.text + unary.details + broken.details


@pytest.mark.parametrize("reason", ["error", "abort"])
def test_an_output_that_is_no_answer_never_leaves_as_one(front: Front, reason: str) -> None:
    front.engine.finish_reason = reason
    assert front.post("/v1/completions", prompt="hello").status_code == 503
    assert front.generate(prompt="hello")[1].code is grpc.StatusCode.UNAVAILABLE
    assert not any(chunk.finish_reason for chunk in front.stream(prompt="hello")[0])


def test_a_passed_deadline_aborts_the_engine_and_says_so(front: Front) -> None:
    front.engine.delay_s = 30.0
    late = front.request("POST", "/v1/completions", json={"prompt": "x"}, headers={"x-request-timeout-ms": "50"})
    assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert front.generate(prompt="x", timeout_s=0.05)[1].code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert front.engine.aborted == 2


def test_a_client_that_leaves_aborts_its_request(front: Front) -> None:
    front.engine.delay_s = 0.05
    front.leave_early(prompt="x")
    assert front.engine.aborted == 1


def test_prompt_and_answer_must_fit_the_context_on_every_surface(front: Front) -> None:
    for prompt in ("x" * 62, [1] * 62):
        refused = front.post("/v1/completions", prompt=prompt, max_tokens=3, stream=True)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
        assert "62" in refused.json()["error"]["message"] and "64" in refused.json()["error"]["message"]
    refused_rpc = front.generate(prompt="x" * 62, max_tokens=3)[1]
    assert (refused_rpc.code, refused_rpc.details) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        refused.json()["error"]["message"],
    )
    assert front.engine.seen == []


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 2.5},
        {"top_p": 0.0},
        {"seed": 2**63 - 1},
        {"logprobs": 21},
        {"stop": ["x"] * 17},
        {"stop": [""]},
        {"min_tokens": 4, "max_tokens": 3},
        {"presence_penalty": -3.0},
        {"request_id": "a b"},
        {"temperature": 0.0, "top_k": 5, "seed": 7, "min_p": 0.5, "ignore_eos": True, "max_tokens": 3},
    ],
)
def test_the_same_request_gets_the_same_verdict_and_parameters_everywhere(
    front: Front, fields: dict[str, object]
) -> None:
    http = front.post("/v1/completions", prompt="hello", **fields)
    _, rpc = front.generate(prompt="hello", **fields)
    if http.status_code == 200:
        assert rpc.code is grpc.StatusCode.OK
        over_http, over_rpc = front.engine.seen
        assert repr(over_http) == repr(over_rpc)
    else:
        assert (http.status_code, rpc.code) == (400, grpc.StatusCode.INVALID_ARGUMENT)
        assert http.json()["error"]["message"] == rpc.details
        assert rpc.details.startswith(http.json()["error"]["param"])


def test_beyond_the_limit_every_surface_refuses_at_once_and_says_when_to_come_back(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = GATEWAY.refused_rpcs
    monkeypatch.setattr(front.whole.load, "limit", 0)
    _, unary = front.generate(prompt="hi")
    _, stream = front.stream(prompt="hi")
    assert (unary.code, unary.trailers["retry-after"]) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "1")
    assert stream.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert GATEWAY.refused_rpcs == before + 2  # on gRPC's thread, before the loop has heard of them
    answer = front.post("/v1/completions", prompt="hi")
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    assert front.check("")[1].code is grpc.StatusCode.OK  # health is no generation


def test_an_unknown_model_is_not_found(front: Front) -> None:
    assert front.post("/v1/completions", model="other", prompt="x").status_code == 404
    assert front.generate(model="other", prompt="x")[1].code is grpc.StatusCode.NOT_FOUND


def test_a_body_over_the_limit_is_refused_unread(front: Front) -> None:
    assert front.post("/v1/completions", prompt="x" * 5000).status_code == 413


def test_a_stream_that_breaks_inside_the_server_does_not_look_complete(front: Front) -> None:
    async def breaking(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
        raise RuntimeError("secret")

    whole, front.app._app = front.app._app, breaking
    try:
        text = front.request("GET", "/version").text
    finally:
        front.app._app = whole
    assert "internal error" in text and "secret" not in text


def test_the_chunks_of_a_stream_add_up_to_the_whole_answer(front: Front) -> None:
    whole, _ = front.generate(prompt="hello", request_id="mine")
    chunks, _ = front.stream(prompt="hello")
    assert "".join(chunk.text for chunk in chunks) == whole.text == "abc"
    assert [token for chunk in chunks for token in chunk.token_ids] == list(whole.token_ids)
    assert (chunks[-1].finish_reason, chunks[-1].prompt_tokens, chunks[-1].completion_tokens) == ("length", 5, 3)
    assert whole.request_id == "mine" and not any(chunk.finish_reason for chunk in chunks[:-1])


def test_health_is_the_process_and_readiness_the_cluster(front: Front) -> None:
    assert front.request("GET", "/expertmesh/status").json()["controller"] == {"placement_version": 7}
    front.replicas["experts-0"] = {"STARTING": 1}
    assert front.request("GET", "/health").status_code == 200
    ready = front.request("GET", "/ready")
    assert ready.status_code == 503 and "experts-0" in ready.text and ready.headers["retry-after"] == "1"
    assert [front.check(name)[0] for name in ("", INFERENCE)] == [1, 2]  # SERVING, NOT_SERVING
    assert front.check("other")[1].code is grpc.StatusCode.NOT_FOUND


def test_model_info_tells_the_experts(front: Front) -> None:
    info = front.whole._model_info
    assert (info.name, info.dtype, info.max_model_len, info.vocab_size) == ("nano", "float32", CONTEXT, 259)
    assert (info.num_experts, info.top_k, info.num_model_groups, info.topk_group) == (16, 4, 8, 3)


def test_an_answer_for_which_rows_were_dropped_says_so_on_every_surface(front: Front) -> None:
    front.engine.dropped_rows = [12]
    completion = front.post("/v1/completions", prompt="hello")
    chat = front.post("/v1/chat/completions", messages=[{"role": "user", "content": "hé"}])
    for answer in (completion, chat):
        assert answer.json()["expertmesh"] == {"dropped_rows": 12}
        assert int(answer.headers["content-length"]) == len(answer.content)
        assert answer.json()["choices"][0].get("routed_experts") is None
    assert completion.json()["choices"][0]["text"] == "abc"
    assert front.generate(prompt="hello")[0].dropped_rows == 12
    assert [chunk.dropped_rows for chunk in front.stream(prompt="hello")[0]] == [0, 0, 12]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_says_it_in_the_chunk_that_ends_the_choice_and_in_the_usage(front: Front, path: str) -> None:
    front.engine.dropped_rows = [12]
    asked = {"prompt": "hello"} if "chat" not in path else {"messages": [{"role": "user", "content": "hi"}]}
    text = front.post(path, **asked, stream=True, stream_options={"include_usage": True}).text
    *events, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    ends = [bool(chunk.get("usage")) or bool(chunk["choices"][0]["finish_reason"]) for chunk in chunks]
    assert ends[-2:] == [True, True] and not any(ends[:-2])
    assert [chunk.get("expertmesh") for chunk in chunks] == [{"dropped_rows": 12} if end else None for end in ends]


def test_the_dropped_rows_of_several_prompts_are_added(front: Front) -> None:
    front.engine.dropped_rows = [5, 0, 7]
    assert front.post("/v1/completions", prompt=["a", "b", "c"]).json()["expertmesh"] == {"dropped_rows": 12}
    events = front.post("/v1/completions", prompt=["a", "b", "c"], stream=True).text.split("\n\n")
    assert json.loads(events[-3].removeprefix("data: "))["expertmesh"] == {"dropped_rows": 12}
    assert events[-2:] == ["data: [DONE]", ""]


def test_an_answer_with_all_its_rows_says_nothing_of_them(front: Front) -> None:
    front.post("/v1/completions", prompt="hello")
    for stream in (False, True):
        assert "expertmesh" not in front.post("/v1/completions", prompt="hello", stream=stream).text


def test_an_error_after_dropped_rows_is_the_error(front: Front) -> None:
    front.engine.dropped_rows = [3]
    front.engine.finish_reason = "error"
    for stream in (False, True):
        answer = front.post("/v1/completions", prompt="hello", stream=stream)
        assert "expertmesh" not in answer.text and '"error"' in answer.text
