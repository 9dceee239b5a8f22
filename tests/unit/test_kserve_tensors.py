"""KServe's tensors and parameters: what is read, what is refused by which name, and what an answer looks like."""

import json
import math
import struct
from dataclasses import dataclass
from types import ModuleType
from typing import Any, cast

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor

from cluster.kserve_answer import Answer, OutputTensor
from cluster.kserve_request import MAX_SAMPLING_BYTES, Asked, read_request
from cluster.kserve_tensors import INPUTS, OUTPUTS
from cluster.validate import GenerationRequest, Limits, check
from experts.errors import RequestError

pb = cast("ModuleType", service_pb2)
LIMITS = Limits(max_model_len=100, vocab_size=50)


def a_bytes(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<I", len(raw)) + raw


def a_request(raw: dict[str, bytes] | None = None, **parameters: object) -> Any:
    """Inputs with raw contents; `text_input` is there unless it is given."""
    request = pb.ModelInferRequest(model_name="nano")
    datatypes = {spec.name: spec.datatype for spec in INPUTS} | {"streaming": "BOOL"}
    for name, content in ({"text_input": a_bytes("hello")} | (raw or {})).items():
        request.inputs.add(name=name, datatype=datatypes.get(name, "BYTES"), shape=[1])
        request.raw_input_contents.append(content)
    for name, value in parameters.items():
        kinds = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}
        setattr(request.parameters[name], kinds[type(value)], value)
    return request


def a_sampling(text: object) -> Any:
    return a_request({"sampling_parameters": a_bytes(text if isinstance(text, str | bytes) else json.dumps(text))})


def read(request: Any) -> Asked:
    return read_request(request, LIMITS)


def refusal(request: Any) -> RequestError:
    with pytest.raises(RequestError) as refused:
        check(read(request).generation, LIMITS)
    assert len(str(refused.value)) < 400
    str(refused.value).encode()
    return refused.value


def test_a_prompt_alone_is_a_request() -> None:
    asked = read(a_request())
    assert asked.generation == GenerationRequest(prompt="hello", model="nano")
    assert (asked.stream, asked.prompt, asked.outputs, asked.tells_logprobs) == (
        False,
        "hello",
        ("text_output",),
        False,
    )


def test_what_tritonclient_writes_is_read() -> None:
    raw = serialize_byte_tensor(np.array(["grüße".encode()], dtype=np.object_)).item()
    assert read(a_request({"text_input": raw})).generation.prompt == "grüße"
    assert read(a_request({"stream": np.array([True]).tobytes()})).stream


def test_typed_contents_are_read_as_raw_ones_are() -> None:
    request = pb.ModelInferRequest(model_name="nano")
    request.inputs.add(name="text_input", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"hello")
    request.inputs.add(name="stream", datatype="BOOL", shape=[1]).contents.bool_contents.append(True)
    asked = read(request)
    assert (asked.generation.prompt, asked.stream) == ("hello", True)


def test_raw_and_typed_contents_are_not_mixed() -> None:
    request = a_request()
    request.inputs[0].contents.bytes_contents.append(b"hello")
    assert refusal(request).field == "text_input"
    request = a_request({"stream": b"\1"})
    del request.raw_input_contents[1]
    request.inputs[1].contents.bool_contents.append(True)
    assert refusal(request).field == "raw_input_contents"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\5\0\0",
        b"\5\0\0\0hell",
        b"\5\0\0\0hello!",
        b"\xff\xff\xff\xffhello",
        a_bytes("a") + a_bytes("b"),
        a_bytes(b"\xff\xfe"),
        a_bytes(b"\xed\xa0\x80"),
        a_bytes(""),
        a_bytes("x" * 1601),
    ],
)
def test_a_text_has_all_of_its_bytes_and_no_others_and_is_utf8(raw: bytes) -> None:
    assert refusal(a_request({"text_input": raw})).field == "text_input"


@pytest.mark.parametrize("raw", [b"", b"\2", b"\0\0", b"\xff", b"true"])
def test_a_flag_is_one_byte_of_0_or_1(raw: bytes) -> None:
    assert refusal(a_request({"stream": raw})).field == "stream"


@pytest.mark.parametrize("shape", [[], [0], [2], [-1], [1, 1], [2**62, 2**62], [1] * 1000])
def test_every_input_has_shape_1(shape: list[int]) -> None:
    request = a_request()
    request.inputs[0].shape[:] = shape
    assert refusal(request).field == "text_input"


@pytest.mark.parametrize("datatype", ["", "STRING", "INT64", "BOOL", "x" * 1000])
def test_every_input_has_its_datatype(datatype: str) -> None:
    request = a_request()
    request.inputs[0].datatype = datatype
    assert refusal(request).field == "text_input"


@pytest.mark.parametrize("name", ["image", "embedding_request", "lora_name", "INPUT0", "", "text_output"])
def test_unknown_tensors_are_refused_by_name(name: str) -> None:
    assert refusal(a_request({name: a_bytes("x")})).field == name


def test_a_tensor_is_given_once_under_whatever_name() -> None:
    assert read(a_request({"streaming": b"\1"})).stream
    assert refusal(a_request({"stream": b"\1", "streaming": b"\1"})).field == "streaming"
    request = a_request()
    request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    request.raw_input_contents.append(a_bytes("x"))
    assert refusal(request).field == "text_input"


def test_there_are_as_many_contents_as_inputs() -> None:
    request = a_request()
    request.raw_input_contents.append(b"")
    assert refusal(request).field == "raw_input_contents"
    del request.raw_input_contents[:]
    assert refusal(request).field == "text_input"
    assert refusal(pb.ModelInferRequest()).field == "text_input"


def test_shared_memory_is_refused_for_inputs_and_outputs() -> None:
    request = a_request()
    request.inputs[0].parameters["shared_memory_region"].string_param = "region"
    del request.raw_input_contents[:]
    assert refusal(request).field == "shared_memory_region"
    request = a_request()
    request.outputs.add(name="text_output").parameters["shared_memory_region"].string_param = "region"
    assert refusal(request).field == "shared_memory_region"
    request = a_request()
    request.outputs.add(name="text_output").parameters["classification"].int64_param = 2
    assert refusal(request).field == "classification"


def test_the_parameters_of_kserves_client_are_taken_where_they_are_true() -> None:
    request = a_request()
    request.inputs[0].parameters["binary_data_size"].int64_param = len(request.raw_input_contents[0])
    request.outputs.add(name="text_output").parameters["binary_data"].bool_param = False
    request.parameters["binary_data_output"].bool_param = True
    assert read(request).outputs == ("text_output",)
    request.inputs[0].parameters["binary_data_size"].int64_param = 7
    assert refusal(request).field == "binary_data_size"


def test_sampling_is_read_from_texts_as_from_numbers() -> None:
    values = {"temperature": 0.5, "max_tokens": 7, "ignore_eos": True, "top_k": -1, "seed": 3, "logit_bias": {"3": -1}}
    texts = {"temperature": "0.5", "max_tokens": "7", "ignore_eos": "True", "top_k": "-1", "seed": "3"}
    texts["logit_bias"] = '{"3": -1}'
    expected = read(a_sampling(values)).generation
    assert expected.temperature == 0.5 and expected.logit_bias == {"3": -1}
    assert read(a_sampling(texts)).generation == expected
    assert read(a_request(None, **texts)).generation == expected
    assert read(a_request(None, **(values | {"logit_bias": '{"3": -1}'}))).generation == expected


def test_a_stop_is_a_text_or_a_list_of_them() -> None:
    assert read(a_sampling({"stop": "[1]"})).generation.stop == ("[1]",)
    assert read(a_sampling({"stop": ["a", "b"]})).generation.stop == ["a", "b"]
    assert read(a_request(stop="a", stop_token_ids="[1, 2]")).generation.stop_token_ids == [1, 2]


def test_null_is_the_default() -> None:
    nulls = dict.fromkeys(("temperature", "seed", "stop", "lora_name"))
    assert read(a_sampling(nulls)).generation == read(a_request()).generation


@pytest.mark.parametrize(
    "name",
    [
        "lora_name",
        "guided_decoding",
        "structured_outputs",
        "prompt_logprobs",
        "prompt",
        "model",
        "extra_args",
        "\n",
        "",
    ],
)
def test_unknown_sampling_is_refused_by_name(name: str) -> None:
    assert refusal(a_sampling({name: 1})).field == name
    assert refusal(a_request(None, **{name: 1})).field == name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "NaN"),
        ("temperature", "inf"),
        ("temperature", "1e999"),
        ("temperature", "0x1"),
        ("temperature", ""),
        ("temperature", " 1"),
        ("temperature", "٣"),
        ("temperature", "3"),
        ("temperature", True),
        ("temperature", [1]),
        ("max_tokens", "1.5"),
        ("max_tokens", 1.5),
        ("max_tokens", "1_0"),
        ("max_tokens", "9" * 21),
        ("max_tokens", 10**300),
        ("max_tokens", {}),
        ("ignore_eos", "yes"),
        ("ignore_eos", 1),
        ("n", 17),
        ("logprobs", 21),
        ("stop", ["\ud800"]),
        ("stop", "x" * 257),
        ("stop", [1]),
        ("stop_token_ids", "[50]"),
        ("stop_token_ids", "1"),
        ("logit_bias", '{"1": NaN}'),
        ("logit_bias", {"\ud800": 1}),
    ],
)
def test_wrong_sampling_is_refused_by_name(name: str, value: object) -> None:
    field = refusal(a_sampling({name: value})).field
    assert field == name or (field == "sampling_parameters" and "\\ud800" in json.dumps(value))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "{",
        '{"seed": 1, "seed": 2}',
        '{"temperature": NaN}',
        '{"temperature": Infinity}',
        '{"seed": ' + "1" * 5000 + "}",
        '{"stop": ' + "[" * 30000 + "]" * 30000 + "}",
        '{"stop": "' + "x" * MAX_SAMPLING_BYTES + '"}',
        b'{"stop": "\xff"}',
    ],
)
def test_sampling_is_strict_json_of_bounded_size(text: str | bytes) -> None:
    assert refusal(a_sampling(text)).field == "sampling_parameters"


def test_sampling_is_given_in_one_place() -> None:
    request = a_sampling({"seed": 1})
    request.parameters["temperature"].double_param = 1.0
    assert refusal(request).field == "temperature"


def test_a_parameter_has_a_value() -> None:
    request = a_request()
    request.parameters["temperature"].Clear()
    assert refusal(request).field == "temperature"


def test_the_timeout_is_a_deadline_in_microseconds() -> None:
    assert read(a_request(timeout=1_500_000)).generation.timeout_s == 1.5
    assert read(a_request(timeout=0)).generation.timeout_s is None
    assert read(a_request(timeout=3_600_000_000)).generation.timeout_s == 3600
    for wrong in (-1, 3_600_000_001, 1.5, "1", True):
        assert refusal(a_request(timeout=wrong)).field == "timeout"


@pytest.mark.parametrize(
    ("name", "harmless", "asking"),
    [
        ("sequence_id", 0, 7),
        ("sequence_id", "", "s"),
        ("sequence_start", False, True),
        ("sequence_end", False, True),
        ("priority", 0, 1),
        ("binary_data_output", True, "x"),
        ("triton_enable_empty_final_response", True, 1),
    ],
)
def test_tritons_own_parameters_are_taken_where_they_ask_for_nothing(
    name: str, harmless: object, asking: object
) -> None:
    assert read(a_request(None, **{name: harmless})).generation == read(a_request()).generation
    assert refusal(a_request(None, **{name: asking})).field == name


@pytest.mark.parametrize("name", ["headers", "triton_x", "shared_memory_region"])
def test_other_reserved_parameters_are_refused_by_name(name: str) -> None:
    assert refusal(a_request(None, **{name: "x"})).field == name


def test_a_stream_leaves_the_prompt_out_and_may_not_do_otherwise() -> None:
    assert read(a_request({"stream": b"\1"})).prompt == ""
    assert read(a_request({"exclude_input_in_output": b"\1"})).prompt == ""
    wrong = refusal(a_request({"stream": b"\1", "exclude_input_in_output": b"\0"}))
    assert str(wrong) == ("Error generating stream: When streaming, `exclude_input_in_output` = False is not allowed.")


def test_outputs_are_those_that_are_named_or_else_flagged() -> None:
    flags = {"return_num_output_tokens": b"\1", "return_finish_reason": b"\1", "return_logprobs": b"\0"}
    assert read(a_request(flags)).outputs == ("text_output", "finish_reason", "num_output_tokens")
    request = a_request(flags)
    request.outputs.add(name="num_input_tokens")
    request.outputs.add(name="text_output")
    assert read(request).outputs == ("text_output", "num_input_tokens")
    request.outputs.add(name="text_output")
    assert refusal(request).field == "text_output"
    request.outputs[2].name = "tokens"
    assert refusal(request).field == "tokens"


def test_a_cumulative_logprob_is_worked_out_though_no_logprobs_are_told() -> None:
    asked = read(a_request({"return_cumulative_logprob": b"\1"}))
    assert (asked.generation.logprobs, asked.tells_logprobs) == (0, False)
    asked = read(a_request({"return_cumulative_logprob": b"\1"}, logprobs=2))
    assert (asked.generation.logprobs, asked.tells_logprobs) == (2, True)


RAW = st.one_of(st.binary(max_size=64), st.text(max_size=32).map(a_bytes), st.sampled_from([b"\0", b"\1"]))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
)
SAMPLING_NAMES = st.sampled_from(
    ["temperature", "max_tokens", "stop", "logit_bias", "stop_token_ids", "ignore_eos", "n"]
)
SETTINGS = settings(deadline=None, derandomize=True, max_examples=400)


def is_answered_or_refused(request: Any) -> None:
    try:
        check(read(request).generation, LIMITS)
    except RequestError as exc:
        str(exc).encode()
        (exc.field or "").encode()


@SETTINGS
@given(st.dictionaries(st.sampled_from([spec.name for spec in INPUTS] + ["streaming", "image"]), RAW))
def test_whatever_bytes_come_they_are_read_or_refused(raw: dict[str, bytes]) -> None:
    is_answered_or_refused(a_request(raw))


@SETTINGS
@given(st.dictionaries(SAMPLING_NAMES | st.text(max_size=8), JSON, max_size=4))
def test_whatever_sampling_comes_it_is_read_or_refused(sampling: dict[str, object]) -> None:
    is_answered_or_refused(a_sampling(sampling))


@SETTINGS
@given(st.text(max_size=64) | st.binary(max_size=64))
def test_whatever_text_is_sampling_it_is_read_or_refused(text: str | bytes) -> None:
    is_answered_or_refused(a_sampling(text.encode(errors="replace") if isinstance(text, str) else text))


@SETTINGS
@given(st.dictionaries(SAMPLING_NAMES, st.text(max_size=16).map(lambda text: text.encode(errors="replace").decode())))
def test_whatever_texts_are_parameters_they_are_read_or_refused(parameters: dict[str, str]) -> None:
    is_answered_or_refused(a_request(None, **parameters))


@SETTINGS
@given(st.binary(max_size=200), st.integers(0, 200))
def test_whatever_message_comes_it_is_read_or_refused(noise: bytes, at: int) -> None:
    whole = a_request({"stream": b"\1"}, seed=3).SerializeToString()
    try:
        request = pb.ModelInferRequest.FromString(whole[:at] + noise + whole[at + len(noise) :])
    except DecodeError:
        return
    is_answered_or_refused(request)


@dataclass(kw_only=True)
class Token:
    logprob: float
    rank: int | None = 1
    decoded_token: str | None = "a"


@dataclass(kw_only=True)
class New:
    """What an engine says of one choice."""

    index: int = 0
    text: str = ""
    token_ids: tuple[int, ...] = ()
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Token]] | None = None
    finish_reason: str | None = None


def an_answer(*outputs: str, num_choices: int = 1, prompt: str = "", tells_logprobs: bool = True) -> Answer:
    asked = Asked(
        generation=GenerationRequest(), stream=True, prompt=prompt, outputs=outputs, tells_logprobs=tells_logprobs
    )
    return Answer(asked, num_choices=num_choices, num_prompt_tokens=5)


def values(tensor: OutputTensor) -> list[object]:
    """As tritonclient reads it."""
    if tensor.datatype == "BYTES":
        found = [element.decode() for element in deserialize_bytes_tensor(tensor.raw)]
    else:
        found = np.frombuffer(tensor.raw, dtype={"FP32": "<f4", "UINT32": "<u4"}[tensor.datatype]).tolist()
    assert len(found) == tensor.num_elements
    return found


def test_every_message_has_an_element_for_each_choice_and_tells_only_news() -> None:
    answer = an_answer("text_output", "finish_reason", "num_input_tokens", "num_output_tokens", num_choices=2)
    answer.take([New(text="ab", token_ids=(1, 2))])
    first = [values(tensor) for tensor in answer.tensors()]
    assert first == [["ab", ""], ["None", "None"], [5], [2, 0]]
    answer.take([New(index=1, text="x", token_ids=(3,), finish_reason="stop")])
    assert [values(tensor) for tensor in answer.tensors()] == [["", "x"], ["None", "stop"], [5], [0, 1]]
    answer.take([New(text="c", token_ids=(4,), finish_reason="length")])
    assert [values(tensor) for tensor in answer.tensors()] == [["c", ""], ["length", "stop"], [5], [1, 0]]


def test_each_choice_begins_with_the_prompt_once() -> None:
    answer = an_answer("text_output", num_choices=2, prompt="Say ")
    answer.take([New(text="a"), New(index=1, text="b")])
    assert values(answer.tensors()[0]) == ["Say a", "Say b"]
    assert values(answer.tensors()[0]) == ["", ""]


def test_logprobs_are_json_of_the_new_tokens_or_null() -> None:
    new = New(token_ids=(7,), logprobs=[{7: Token(logprob=-0.5), 8: Token(logprob=-math.inf, rank=None)}])
    answer = an_answer("logprobs")
    answer.take([new])
    assert json.loads(cast("str", values(answer.tensors()[0])[0])) == [
        {
            "7": {"logprob": -0.5, "rank": 1, "decoded_token": "a"},
            "8": {"logprob": -9999.0, "rank": None, "decoded_token": "a"},
        }
    ]
    assert values(answer.tensors()[0]) == ["[]"]
    silent = an_answer("logprobs", tells_logprobs=False)
    silent.take([new])
    assert values(silent.tensors()[0]) == ["null"]


def test_the_cumulative_logprob_is_the_newest() -> None:
    answer = an_answer("cumulative_logprob", num_choices=2)
    answer.take([New(cumulative_logprob=-1.5)])
    first, second = cast("list[float]", values(answer.tensors()[0]))
    assert first == -1.5 and math.isnan(second)
    answer.take([New(index=1, cumulative_logprob=-2.0), New(cumulative_logprob=-3.0)])
    assert values(answer.tensors()[0]) == [-3.0, -2.0]


def test_every_declared_output_can_be_made() -> None:
    answer = an_answer(*(spec.name for spec in OUTPUTS))
    answer.take([New(text="a", token_ids=(1,), cumulative_logprob=-1.0, logprobs=[{}], finish_reason="stop")])
    for tensor, spec in zip(answer.tensors(), OUTPUTS, strict=True):
        assert (tensor.name, tensor.datatype, len(values(tensor))) == (spec.name, spec.datatype, 1)
