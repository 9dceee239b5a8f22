"""The mark of dropped rows goes through vLLM's own classes: the process boundary, its output processor, n answers."""

import pytest
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.engine.parallel_sampling import ParentRequest
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from cluster.drop_mark import mark, take_mark


class Engine:
    """vLLM's output processor, and in front of it the encoding between its processes."""

    def __init__(self, kind: RequestOutputKind, *, n: int = 1) -> None:
        self.processor = OutputProcessor(None, log_stats=False)
        params = SamplingParams(n=n, max_tokens=9, output_kind=kind, detokenize=False)
        whole = _request("a", params)
        parent = ParentRequest(whole) if n > 1 else None
        for index in range(n):
            name, own = parent.get_child_info(index) if parent is not None else ("a", params)
            self.processor.add_request(_request(name, own), None, parent, index)

    def step(self, *dropped_rows: int, end: bool = False) -> list[RequestOutput]:
        """One step with a token for each choice; dropped_rows: what the mark of each is told."""
        outputs = []
        for name, dropped in zip(list(self.processor.request_states), dropped_rows, strict=True):
            reason = FinishReason.LENGTH if end else None
            outputs.append(EngineCoreOutput(request_id=name, new_token_ids=[7], finish_reason=reason))
            if dropped:
                mark(outputs[-1], dropped)
        sent = MsgpackEncoder().encode(EngineCoreOutputs(outputs=outputs))
        received: EngineCoreOutputs = MsgpackDecoder(EngineCoreOutputs).decode(sent)
        made = self.processor.process_outputs(received.outputs).request_outputs
        return [output for output in made if isinstance(output, RequestOutput)]


def _request(request_id: str, params: SamplingParams) -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id=request_id,
        external_req_id="a",
        prompt_token_ids=[1, 2],
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


@pytest.mark.parametrize("kind", [RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY])
def test_the_marks_of_all_steps_come_with_the_last_output(kind: RequestOutputKind) -> None:
    engine = Engine(kind)
    early = [take_mark(output) for dropped in (3, 0, 4) for output in engine.step(dropped)]
    assert not any(early)
    (last,) = engine.step(5, end=True)
    assert last.finished and take_mark(last) == 12


def test_the_marks_of_several_choices_are_added_once_all_are_there() -> None:
    engine = Engine(RequestOutputKind.FINAL_ONLY, n=2)
    assert engine.step(3, 4) == []
    (last,) = engine.step(0, 5, end=True)
    assert take_mark(last) == 12


def test_a_mark_outlives_the_merging_of_outputs_that_were_not_fetched() -> None:
    engine = Engine(RequestOutputKind.DELTA)
    (first,) = engine.step(3)
    (last,) = engine.step(4, end=True)
    first.add(last, aggregate=True)
    assert take_mark(first) == 7


def test_a_mark_can_be_taken_once_and_nothing_of_it_stays() -> None:
    engine = Engine(RequestOutputKind.DELTA)
    (last,) = engine.step(3, end=True)
    assert [take_mark(last), take_mark(last)] == [3, 0]
    assert last.outputs[0].routed_experts is None


def test_an_output_that_was_never_marked_has_no_dropped_rows() -> None:
    choice = CompletionOutput(
        index=0, text="", token_ids=[], cumulative_logprob=None, logprobs=None, finish_reason="stop"
    )
    assert take_mark(RequestOutput("a", None, [], None, [choice], True)) == 0
