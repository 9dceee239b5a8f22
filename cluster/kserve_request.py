"""A KServe v2 inference request as one logical request: its tensors, and its sampling from JSON or from parameters.

Sampling is given as Triton's vLLM backend takes it: in the tensor `sampling_parameters`, a JSON object whose values
may be texts, or in the request's map of parameters. Names are vLLM's; one that we do not serve is refused by name.
Pure, as cluster/kserve_tensors.py.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

from cluster.kserve_tensors import (
    InferRequest,
    Parameter,
    outputs_of_flags,
    read_inputs,
    read_outputs,
    refuse,
    value_of,
)
from cluster.strict_json import read_json
from cluster.validate import GenerationRequest, Limits, check_text
from experts.errors import RequestError

MAX_SAMPLING_BYTES = 1 << 16  # of JSON; the longest lists that our limits allow have a third of it

_WHOLE_NUMBERS = frozenset({"max_tokens", "min_tokens", "top_k", "n", "seed", "logprobs"})
_NUMBERS = frozenset(
    {"temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"},
)
_FLAGS = frozenset({"ignore_eos", "skip_special_tokens", "include_stop_str_in_output"})
_JSON = frozenset({"stop_token_ids", "logit_bias"})  # in a text: the JSON of it
_SAMPLING = _WHOLE_NUMBERS | _NUMBERS | _FLAGS | _JSON | {"stop"}
# Triton's own parameters that say nothing here but what is so anyway.
_ONLY_VALUES: Mapping[str, tuple[object, ...]] = {
    "sequence_id": (0, ""),
    "sequence_start": (False,),
    "sequence_end": (False,),
    "priority": (0,),
    "binary_data_output": (True, False),
    "triton_enable_empty_final_response": (True, False),  # allows an empty last message, which is never needed here
}
_WHOLE_TEXT = re.compile(r"[+-]?[0-9]{1,20}")
_NUMBER_TEXT = re.compile(r"[+-]?([0-9]{1,20}\.?[0-9]{0,20}|\.[0-9]{1,20})([eE][+-]?[0-9]{1,3})?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One inference request: the generation that it stands for, and how its answer is to look."""

    generation: GenerationRequest
    stream: bool
    prompt: str  # with which the answer begins; empty where it shall not
    outputs: tuple[str, ...]
    tells_logprobs: bool  # the client asked for them; without that they may serve the cumulative one


def read_request(request: InferRequest, limits: Limits) -> Asked:
    """Raises RequestError with the tensor's or parameter's name; sampling's ranges are left to `validate.check`."""
    inputs = read_inputs(request)
    sampling, timeout_s = _read_parameters(request.parameters, limits)
    if (text := inputs.get("sampling_parameters")) is not None:
        if sampling:
            refuse(next(iter(sampling)), "is given as a parameter, beside the tensor sampling_parameters")
        sampling = _read_sampling_tensor(cast("str", text))
    prompt = inputs.get("text_input")
    if prompt is None:
        refuse("text_input", "is missing")
    check_text("text_input", prompt, limits)
    stream = bool(inputs.get("stream", False))
    exclude = bool(inputs.get("exclude_input_in_output", stream))
    if stream and not exclude:
        raise RequestError(  # in the words of Triton's backend
            "Error generating stream: When streaming, `exclude_input_in_output` = False is not allowed.",
            field="exclude_input_in_output",
        )
    outputs = read_outputs(request.outputs) or outputs_of_flags(inputs)
    tells_logprobs = "logprobs" in sampling
    if "cumulative_logprob" in outputs and not tells_logprobs:
        sampling["logprobs"] = 0  # an engine adds up what it was asked for
    return Asked(
        generation=_build_request(
            prompt=prompt,
            model=request.model_name or None,
            request_id=request.id or None,
            timeout_s=timeout_s,
            **sampling,
        ),
        stream=stream,
        prompt="" if exclude else cast("str", prompt),
        outputs=outputs,
        tells_logprobs=tells_logprobs,
    )


# Sampling has values of any type, and `validate.check` is what finds that out.
_build_request = cast("Callable[..., GenerationRequest]", GenerationRequest)


def _read_parameters(parameters: Mapping[str, Parameter], limits: Limits) -> tuple[dict[str, object], float | None]:
    """Sampling and the deadline in seconds."""
    sampling: dict[str, object] = {}
    timeout_s: float | None = None
    for name, parameter in parameters.items():
        value = value_of(parameter)
        if value is None:
            refuse(name, "has no value")
        if name == "timeout":
            timeout_s = _timeout_s(value, limits)
        elif name in _ONLY_VALUES:
            # 0 == False, so the type counts, too.
            if not any(value == allowed and type(value) is type(allowed) for allowed in _ONLY_VALUES[name]):
                refuse(name, "is not supported with this value")
        else:
            sampling[name] = _sampling_value(name, value)
    return sampling, timeout_s


def _timeout_s(value: object, limits: Limits) -> float | None:
    longest_us = int(limits.max_timeout_s * 1e6)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= longest_us:
        refuse("timeout", f"must be a whole number of microseconds, 0 (no deadline) to {longest_us}")
    return value / 1e6 if value else None


def _read_sampling_tensor(text: str) -> dict[str, object]:
    found = _strict_json("sampling_parameters", text)
    if not isinstance(found, dict):
        refuse("sampling_parameters", "must be a JSON object")
    return {name: _sampling_value(name, value) for name, value in found.items() if value is not None}


def _sampling_value(name: str, value: object) -> object:
    """The value as the validator takes it."""
    if name not in _SAMPLING:
        refuse(name, "is not a sampling parameter that is supported here")
    if name == "stop":
        return (value,) if isinstance(value, str) else value
    return _from_text(name, value) if isinstance(value, str) else value


def _from_text(name: str, text: str) -> object:
    if name in _JSON:
        return _strict_json(name, text)
    if name in _WHOLE_NUMBERS and _WHOLE_TEXT.fullmatch(text):
        return int(text)
    if name in _NUMBERS and _NUMBER_TEXT.fullmatch(text):
        return float(text)
    if name in _FLAGS and text.lower() in ("true", "false"):
        return text.lower() == "true"
    wanted = "true or false" if name in _FLAGS else "a whole number" if name in _WHOLE_NUMBERS else "a number"
    return refuse(name, f"must be {wanted}, and is the text {text[:32]!a}")


def _strict_json(name: str, text: str) -> object:
    """Raises RequestError for what is too long, too deep, ambiguous or not JSON; all of its texts are valid Unicode."""
    if len(text) > MAX_SAMPLING_BYTES:
        refuse(name, f"has {len(text)} characters; at most {MAX_SAMPLING_BYTES} are read")
    return read_json(text, name, name)
