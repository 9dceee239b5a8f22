"""The trained checkpoint that comes with the package: three implementations write the same text from it."""

from collections.abc import Sequence

import pytest
import torch
from engine_runs import EngineProcess, plain_arguments, remote_arguments
from local_plane import PlaneProcess
from transformers import DeepseekV2ForCausalLM

from deploy.config import EMBEDDED
from deploy.parity_traffic import make_prompts
from experts.checkpoint import open_checkpoint

NUM_PROMPTS, NUM_TOKENS = 16, 32


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    vocab_size = open_checkpoint(EMBEDDED).config["vocab_size"]
    assert isinstance(vocab_size, int)
    return make_prompts(EMBEDDED, NUM_PROMPTS, vocab_size=vocab_size)


def test_transformers_vllm_and_remote_experts_write_the_same_tokens_in_float32(
    plain: EngineProcess, remote: EngineProcess, prompts: list[list[int]]
) -> None:
    plain.load(plain_arguments(EMBEDDED))
    by_vllm = [outcome.tokens for outcome in plain.generate(prompts, max_tokens=NUM_TOKENS)]
    with PlaneProcess(EMBEDDED, dtype="float32", num_groups=4) as plane:
        remote.load(remote_arguments(plane.model))
        by_us = [outcome.tokens for outcome in remote.generate(prompts, max_tokens=NUM_TOKENS)]
    model = DeepseekV2ForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32).eval()
    assert by_vllm == [greedy(model, prompt) for prompt in prompts]
    assert by_us == by_vllm


@torch.no_grad()
def greedy(model: DeepseekV2ForCausalLM, prompt: Sequence[int]) -> list[int]:
    """NUM_TOKENS tokens, an end of text among them being a token like any other."""
    ids, cache, tokens = torch.tensor([prompt]), None, []
    for _ in range(NUM_TOKENS):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        tokens.append(int(output.logits[0, -1].argmax()))
        ids = torch.tensor([[tokens[-1]]])
    return tokens
