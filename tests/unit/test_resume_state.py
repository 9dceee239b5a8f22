"""What model runner V1 knows of a request that begins in the middle of its answer."""

from types import SimpleNamespace
from typing import cast

import pytest
import torch
import vllm._custom_ops  # noqa: F401  (the CPU sampler's kernel)
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler
from vllm.v1.worker.gpu_input_batch import CachedRequestState

from cluster.continuation import EARLIER_TOKENS
from cluster.vllm_resume import bring_states_up_to_date

VOCABULARY = 512
SEED = 9


@pytest.fixture(params=[False, True], ids=["float32 noise", "float64 noise"])
def sampler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> TopKTopPSampler:
    """A sampler of the kind that the states are prepared for; one of them draws per request, the other per token."""
    monkeypatch.setattr(CachedRequestState, "__post_init__", CachedRequestState.__post_init__)
    model = SimpleNamespace(use_fp64_gumbel=request.param, get_vocab_size=lambda: VOCABULARY)
    bring_states_up_to_date(cast("VllmConfig", SimpleNamespace(model_config=model)))
    return TopKTopPSampler(use_fp64_gumbel=request.param)


def state(params: SamplingParams, generator: torch.Generator | None) -> CachedRequestState:
    return CachedRequestState(
        req_id="r",
        prompt_token_ids=[1, 2, 3],
        mm_features=[],
        sampling_params=params,
        generator=generator,
        block_ids=([0],),
        num_computed_tokens=0,
        output_token_ids=[],
    )


@pytest.mark.parametrize("earlier", [[], [7], [7, 8, 9, 7]])
def test_it_has_its_earlier_output_and_its_draws_behind_it(sampler: TopKTopPSampler, earlier: list[int]) -> None:
    expected, found = (torch.Generator().manual_seed(SEED) for _ in range(2))
    for _ in earlier:
        logits = torch.randn(1, VOCABULARY).expand(2, -1).contiguous()
        sampler.forward(logits, {0: expected}, torch.tensor([5, 9]), torch.tensor([0.5, 0.9]))
    begun = state(SamplingParams(seed=SEED, extra_args={EARLIER_TOKENS: earlier}), found)
    assert (begun.output_token_ids, begun.num_prompt_tokens, begun.num_tokens) == (earlier, 3, 3 + len(earlier))
    assert torch.equal(found.get_state(), expected.get_state())


def test_a_request_without_a_generator_draws_nothing(sampler: TopKTopPSampler) -> None:
    assert state(SamplingParams(temperature=0.0), None).output_token_ids == []
    begun = state(SamplingParams(temperature=0.0, extra_args={EARLIER_TOKENS: [4]}), None)
    assert begun.output_token_ids == [4] and begun.generator is None
