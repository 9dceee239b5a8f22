"""An engine whose experts are elsewhere says token for token what an unmodified vLLM says."""

from pathlib import Path

import pytest
from engine_runs import MAX_TOKENS, PROMPTS, Checkpoints, EngineProcess, Reference, make_prompts, remote_arguments
from local_plane import PlaneProcess

# Expert groups by preset: DeepSeek-V2 in every number that divides its n_group, other routing methods in one.
CASES = [
    ("nano", 1),
    ("nano", 2),
    ("nano", 4),
    ("nano", 8),
    ("v2-lite", 4),
    ("v3", 4),
    ("qwen3-moe", 4),
    ("mixtral", 4),
]
# Rounding of 8 bits of mantissa in logits of this size; vLLM differs from itself by as much in another batch.
BFLOAT16_MARGIN = 0.15


@pytest.mark.parametrize(("preset", "num_groups"), CASES)
def test_greedy_tokens_in_float32_are_those_of_an_unmodified_engine(
    remote: EngineProcess, checkpoints: Checkpoints, reference: Reference, preset: str, num_groups: int
) -> None:
    expected = reference(preset)
    with PlaneProcess(checkpoints(preset), dtype="float32", num_groups=num_groups) as plane:
        remote.load(remote_arguments(plane.model))
        assert remote.generate(PROMPTS, max_tokens=MAX_TOKENS) == expected


def test_the_reference_depends_on_its_prompts(reference: Reference) -> None:
    texts = {tuple(outcome.tokens) for outcome in reference("nano")}
    assert len(texts) == len(PROMPTS)
    assert len({token for text in texts for token in text}) > 3 * MAX_TOKENS


def test_every_bfloat16_token_is_the_references_choice_but_for_rounding(
    remote: EngineProcess, plain: EngineProcess, checkpoints: Checkpoints, reference: Reference
) -> None:
    reference("nano", "bfloat16")
    with PlaneProcess(checkpoints("nano"), dtype="bfloat16", num_groups=4) as plane:
        remote.load(remote_arguments(plane.model))
        outcomes = remote.generate(PROMPTS, max_tokens=MAX_TOKENS)
    margins = [plain.margins(prompt, outcome.tokens) for prompt, outcome in zip(PROMPTS, outcomes)]
    assert max(map(max, margins)) <= BFLOAT16_MARGIN


def test_two_engines_get_the_right_tokens_from_one_plane_at_the_same_time(
    remote: EngineProcess, checkpoints: Checkpoints, reference: Reference, tmp_path: Path
) -> None:
    expected = reference("nano")
    with (
        EngineProcess("remote", log=tmp_path / "second.log") as second,
        PlaneProcess(checkpoints("nano"), dtype="float32", num_groups=4) as plane,
    ):
        for engine, member_id in ((remote, "first"), (second, "second")):
            engine.tell("load", arguments=remote_arguments(plane.model, member_id=member_id))
        remote.answer()
        second.answer()
        for _ in range(3):
            for engine in (remote, second):
                engine.tell("generate", prompts=PROMPTS, max_tokens=MAX_TOKENS)
            assert remote.generated() == expected
            assert second.generated() == expected


def test_prompts_that_exceed_one_frame_together_are_computed_in_several_steps(
    remote: EngineProcess, plain: EngineProcess, checkpoints: Checkpoints, reference: Reference
) -> None:
    prompts = make_prompts(8, seed=1, shortest=30, longest=60)
    reference("nano")
    expected = plain.generate(prompts, max_tokens=4)
    with PlaneProcess(checkpoints("nano"), dtype="float32", num_groups=2, max_rows=64) as plane:
        remote.load(remote_arguments(plane.model, max_model_len=64))
        assert remote.generate(prompts, max_tokens=4) == expected


def test_runs_outside_of_a_scheduled_step_are_answered(remote: EngineProcess, checkpoints: Checkpoints) -> None:
    with PlaneProcess(checkpoints("nano"), dtype="float32", num_groups=2) as plane:
        remote.load(remote_arguments(plane.model))
        for num_tokens in (1, 512):
            assert not remote.do("dummy_run", num_tokens=num_tokens)
