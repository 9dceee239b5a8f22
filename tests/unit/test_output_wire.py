"""Outputs on their way to a gateway: few bytes where they suffice, and never anything lost."""

from typing import Any

import numpy as np
import pytest
from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput

from cluster.drop_mark import take_mark
from cluster.output_wire import pack, unpack

PROMPT = list(range(2000))


def choice(**fields: Any) -> CompletionOutput:
    return CompletionOutput(
        **{"index": 0, "text": " tok", "token_ids": [7], "cumulative_logprob": None, "logprobs": None} | fields
    )


def output(*choices: CompletionOutput, **fields: Any) -> RequestOutput:
    plain = {"request_id": "r", "prompt": None, "prompt_token_ids": PROMPT, "prompt_logprobs": None, "finished": False}
    return RequestOutput(**plain | fields, outputs=list(choices))


def carried(given: RequestOutput) -> RequestOutput:
    return unpack(pack(given), request_id="r", prompt_token_ids=PROMPT)


def facts(given: RequestOutput) -> dict[str, Any]:
    return {**vars(given), "outputs": [vars(each) for each in given.outputs]}


@pytest.mark.parametrize(
    "given",
    [
        output(choice()),
        output(choice(text="", token_ids=[]), num_cached_tokens=0),
        output(choice(text="\N{SNOWMAN}\0", cumulative_logprob=-1.5), choice(index=3, token_ids=[1, 2**31])),
        output(choice(finish_reason="stop", stop_reason=11), finished=True, num_cached_tokens=64),
        output(choice(finish_reason="stop", stop_reason="end"), finished=True, num_cache_creation_tokens=3),
        output(choice(finish_reason="error", stop_reason="the router did not answer"), finished=True),
    ],
)
def test_an_ordinary_output_is_a_few_bytes_and_comes_out_as_it_was(given: RequestOutput) -> None:
    packed = pack(given)
    assert isinstance(packed, bytes) and len(packed) < 64
    assert facts(carried(given)) == facts(given)


@pytest.mark.parametrize(
    "given",
    [
        output(choice(logprobs=[{7: Logprob(-0.5, 1, " tok")}])),
        output(choice(), prompt_logprobs=[None, {1: Logprob(-0.5, 1, "a")}]),
        output(choice(routed_experts=np.array([3]))),
        output(choice(weight_versions=[])),
        output(choice(), kv_transfer_params={}),
        output(choice(), prompt="the text"),
    ],
)
def test_what_bytes_cannot_say_goes_as_it_is(given: RequestOutput) -> None:
    assert pack(given) is given and carried(given) is given


def test_a_field_that_a_newer_vllm_adds_is_not_lost() -> None:
    given = output(choice())
    vars(given.outputs[0])["of_tomorrow"] = 1
    assert carried(given) is given


def test_a_mark_of_dropped_rows_is_still_there() -> None:
    assert take_mark(carried(output(choice(routed_experts=np.array([3, 4]))))) == 7
