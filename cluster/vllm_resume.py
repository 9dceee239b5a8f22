"""Requests that begin in the middle of their answer, since another engine has computed its beginning and is lost.

vLLM does nearly all of it for requests that it preempts: prompt and output are computed again in one step, and then it
goes on as if nothing had happened. So the scheduler is told that a request already has output. What vLLM keeps beside
it for a preempted request and cannot know here is brought up to date: in model runner V1 the copy of the output, which
penalties and min_tokens look at, and the random numbers that a seeded request has used up. (Model runner V2 gets the
output with the request, and its random numbers are a function of seed and position.)
"""

from collections.abc import Sequence

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler
from vllm.v1.worker.gpu_input_batch import CachedRequestState

from cluster.continuation import EARLIER_TOKENS

_init_state = CachedRequestState.__post_init__


class ResumingScheduler(Scheduler):
    """Takes up requests whose parameters name earlier tokens, and repeats these in the first output of each."""

    def __init__(self, vllm_config: VllmConfig, *args, **kwargs) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        if not self.use_v2_model_runner:
            bring_states_up_to_date(vllm_config)
        self._not_repeated: dict[str, list[int]] = {}  # by request id: its earlier tokens, until its first output

    def add_request(self, request: Request) -> None:
        if earlier := earlier_tokens(request.sampling_params):
            request.append_output_token_ids(earlier)
            request.num_preemptions = 1  # its prefill is a repeated one, and longer than its prompt
            self._not_repeated[request.request_id] = earlier
        super().add_request(request)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if self._not_repeated:
            for of_client in outputs.values():
                for output in of_client.outputs:
                    if output.new_token_ids and output.request_id in self._not_repeated:
                        put_before(output, self._not_repeated.pop(output.request_id))
            self._not_repeated = {r: tokens for r, tokens in self._not_repeated.items() if r in self.requests}
        return outputs


def earlier_tokens(params: SamplingParams | None) -> list[int]:
    """The tokens with which the answer begins; empty for all ordinary requests."""
    return [] if params is None or params.extra_args is None else params.extra_args.get(EARLIER_TOKENS, [])


def bring_states_up_to_date(vllm_config: VllmConfig) -> None:
    """Makes model runner V1 give a new request its earlier tokens as output; a second call replaces the first."""
    model = vllm_config.model_config
    sampler = TopKTopPSampler(use_fp64_gumbel=model.use_fp64_gumbel)
    logits = _row_to_draw_from(sampler, model.get_vocab_size())

    def init_state(self: CachedRequestState) -> None:
        _init_state(self)
        earlier = earlier_tokens(self.sampling_params)
        self.output_token_ids.extend(earlier)
        if self.generator is not None:
            for _ in earlier:
                # How many random numbers a draw uses up is the sampler's to know, so it draws.
                sampler.forward(logits, {0: self.generator}, None, None)

    CachedRequestState.__post_init__ = init_state


def _row_to_draw_from(sampler: TopKTopPSampler, vocab_size: int) -> torch.Tensor:
    """[1, 1] if a draw uses up as many random numbers for one token as for all of them (a CPU: 0.02 ms, not 2 ms)."""
    rows = [torch.zeros(1, width, device=current_platform.device_type) for width in (1, vocab_size)]
    generators = [torch.Generator(row.device).manual_seed(0) for row in rows]
    for row, generator in zip(rows, generators, strict=True):
        sampler.forward(row, {0: generator}, None, None)
    return rows[0] if torch.equal(generators[0].get_state(), generators[1].get_state()) else rows[1]


def put_before(output: EngineCoreOutput, earlier: Sequence[int]) -> None:
    """Begins an output with tokens that were generated elsewhere; their log-probabilities are given as 0."""
    output.new_token_ids = [*earlier, *output.new_token_ids]
    if (new := output.new_logprobs) is None:
        return
    # vLLM takes the text of half characters from the rows before.
    tokens = np.repeat(np.array(earlier, new.logprob_token_ids.dtype)[:, None], new.logprob_token_ids.shape[1], axis=1)
    output.new_logprobs = LogprobsLists(
        np.concatenate([tokens, new.logprob_token_ids]),
        np.concatenate([np.zeros(tokens.shape, new.logprobs.dtype), new.logprobs]),
        np.concatenate([np.zeros(len(earlier), new.sampled_token_ranks.dtype), new.sampled_token_ranks]),
    )
