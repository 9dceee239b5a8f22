"""KServe v2's tensors, as Triton's vLLM backend declares them, and how a request's are read.

Whatever is not declared is refused by its name, so that nothing a client asks for is silently left out.
Pure: imports neither vLLM, Ray nor gRPC, and knows the messages only by the fields that it reads.
"""

import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple, NoReturn, Protocol

from experts.errors import RequestError


class Parameter(Protocol):
    """InferParameter: one value of five types, or none."""

    def WhichOneof(self, oneof_group: str, /) -> str | None: ...


class Field(Protocol):
    """A field of a message."""

    @property
    def name(self) -> str: ...


class Contents(Protocol):
    """InferTensorContents: one list for each type."""

    def ListFields(self) -> Sequence[tuple[Field, Sequence[object]]]: ...


class InputTensor(Protocol):
    """ModelInferRequest.InferInputTensor."""

    name: str
    datatype: str
    shape: Sequence[int]
    parameters: Mapping[str, Parameter]
    contents: Contents


class RequestedOutput(Protocol):
    """ModelInferRequest.InferRequestedOutputTensor."""

    name: str
    parameters: Mapping[str, Parameter]


class InferRequest(Protocol):
    """ModelInferRequest."""

    model_name: str
    model_version: str
    id: str
    parameters: Mapping[str, Parameter]
    inputs: Sequence[InputTensor]
    outputs: Sequence[RequestedOutput]
    raw_input_contents: Sequence[bytes]


class TensorSpec(NamedTuple):
    """A tensor of one dimension, as ModelMetadata and ModelConfig declare it."""

    name: str
    datatype: str  # BYTES | BOOL | FP32 | UINT32
    num_elements: int = 1  # -1: one for each choice


INPUTS = (
    TensorSpec("text_input", "BYTES"),
    TensorSpec("stream", "BOOL"),
    TensorSpec("sampling_parameters", "BYTES"),
    TensorSpec("exclude_input_in_output", "BOOL"),
    TensorSpec("return_finish_reason", "BOOL"),
    TensorSpec("return_cumulative_logprob", "BOOL"),
    TensorSpec("return_logprobs", "BOOL"),
    TensorSpec("return_num_input_tokens", "BOOL"),
    TensorSpec("return_num_output_tokens", "BOOL"),
)
OUTPUTS = (
    TensorSpec("text_output", "BYTES", -1),
    TensorSpec("finish_reason", "BYTES", -1),
    TensorSpec("cumulative_logprob", "FP32", -1),
    TensorSpec("logprobs", "BYTES", -1),
    TensorSpec("num_input_tokens", "UINT32"),
    TensorSpec("num_output_tokens", "UINT32", -1),
)
_INPUTS = {spec.name: spec for spec in INPUTS} | {"streaming": INPUTS[1]}  # NVIDIA Dynamo's name for it
_OUTPUT_NAMES = tuple(spec.name for spec in OUTPUTS)


def refuse(name: str, why: str) -> NoReturn:
    """Raises RequestError about the field `name`, of which only the beginning is shown."""
    shown = name[:64].encode(errors="replace").decode()
    raise RequestError(f"{shown} {why}", field=shown)


def value_of(parameter: Parameter) -> object:
    """A bool, a whole number, a fraction or a text; None where the message has none of them."""
    kind = parameter.WhichOneof("parameter_choice")
    return None if kind is None else getattr(parameter, kind)


def read_inputs(request: InferRequest) -> dict[str, str | bool]:
    """Each input's one element, by the tensor's name (`stream` for its alias, too).

    Raises RequestError unless every tensor is declared, given once, and has all of its bytes and no others.
    """
    raws = request.raw_input_contents
    found: dict[str, str | bool] = {}
    for i, tensor in enumerate(request.inputs):
        spec = _INPUTS.get(tensor.name)
        if spec is None:
            refuse(tensor.name, f"is not an input that is taken here; these are: {', '.join(_INPUTS)}")
        if spec.name in found:
            refuse(tensor.name, "is given twice")
        raw = raws[i] if i < len(raws) else None
        _check_declaration(tensor, spec, raw)
        found[spec.name] = _typed_value(tensor, spec) if raw is None else _raw_value(tensor, spec, raw)
    if raws and len(raws) != len(request.inputs):
        refuse("raw_input_contents", f"has {len(raws)} entries for {len(request.inputs)} inputs")
    return found


def read_outputs(outputs: Sequence[RequestedOutput]) -> tuple[str, ...]:
    """The names that are asked for, in the order of our table. Raises RequestError."""
    names: set[str] = set()
    for output in outputs:
        if output.name not in _OUTPUT_NAMES:
            refuse(output.name, f"is not an output that is made here; these are: {', '.join(_OUTPUT_NAMES)}")
        if output.name in names:
            refuse(output.name, "is asked for twice")
        for name, parameter in output.parameters.items():
            # KServe's client says over gRPC, too, whether it would like bytes or JSON; here all are bytes.
            if name != "binary_data" or not isinstance(value_of(parameter), bool):
                refuse(name, f"is not offered for the output {output.name}")
        names.add(output.name)
    return tuple(name for name in _OUTPUT_NAMES if name in names)


def outputs_of_flags(inputs: Mapping[str, str | bool]) -> tuple[str, ...]:
    """The outputs of a request that names none."""
    return ("text_output", *(name for name in _OUTPUT_NAMES if inputs.get(f"return_{name}")))


def _check_declaration(tensor: InputTensor, spec: TensorSpec, raw: bytes | None) -> None:
    for name, parameter in tensor.parameters.items():
        if name == "binary_data_size" and raw is not None and value_of(parameter) == len(raw):
            continue  # KServe's client counts its bytes
        refuse(name, f"is not offered for the input {tensor.name}")  # shared memory among others
    if tensor.datatype != spec.datatype:
        refuse(tensor.name, f"must have datatype {spec.datatype}, and has {tensor.datatype[:16]!r}")
    if len(tensor.shape) != 1 or tensor.shape[0] != 1:
        refuse(tensor.name, f"must have shape [1], and has {list(tensor.shape[:8])}")


def _raw_value(tensor: InputTensor, spec: TensorSpec, raw: bytes) -> str | bool:
    if tensor.contents.ListFields():
        refuse(tensor.name, "has both raw and typed contents")
    if spec.datatype == "BOOL":
        if raw not in (b"\0", b"\1"):
            refuse(tensor.name, f"must be one byte of 0 or 1, and is {raw[:4]!r} of {len(raw)} bytes")
        return raw == b"\1"
    size = struct.unpack_from("<I", raw)[0] if len(raw) >= 4 else -1
    if size != len(raw) - 4:
        refuse(tensor.name, f"has {len(raw)} bytes, which are not a length of 4 bytes and that many more")
    return _text(tensor.name, raw[4:])


def _typed_value(tensor: InputTensor, spec: TensorSpec) -> str | bool:
    wanted = "bool_contents" if spec.datatype == "BOOL" else "bytes_contents"
    found = {listed.name: values for listed, values in tensor.contents.ListFields()}
    if found.keys() != {wanted} or len(found[wanted]) != 1:
        shown = ", ".join(f"{len(values)} in {name}" for name, values in found.items()) or "none"
        refuse(tensor.name, f"must have one element, in raw_input_contents or {wanted}, and has {shown}")
    value = found[wanted][0]
    return _text(tensor.name, value) if isinstance(value, bytes) else bool(value)


def _text(name: str, raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        refuse(name, f"is not valid UTF-8 at byte {error.start}")
