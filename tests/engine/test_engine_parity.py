"""An engine whose experts are elsewhere says token for token what an unmodified vLLM says."""

from collections.abc import Iterator

import pytest
from engine_runs import (
    MAX_TOKENS,
    PROMPTS,
    Checkpoints,
    EngineProcess,
    Reference,
    RemoteRun,
    make_prompts,
    plain_arguments,
    remote_arguments,
)
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


@pytest.fixture(scope="module", autouse=True)
def second(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    """Another attention replica; begun with the module, so that it imports vLLM beside the first tests."""
    with EngineProcess("remote", log=tmp_path_factory.mktemp("logs") / "second.log") as engine:
        yield engine


@pytest.mark.parametrize(("preset", "num_groups"), CASES)
def test_greedy_tokens_in_float32_are_those_of_an_unmodified_engine(
    reference: Reference, remote_run: RemoteRun, preset: str, num_groups: int
) -> None:
    assert remote_run(preset, num_groups).outcomes == reference(preset).outcomes


def test_the_reference_depends_on_its_prompts(reference: Reference) -> None:
    texts = {tuple(outcome.tokens) for outcome in reference("nano").outcomes}
    assert len(texts) == len(PROMPTS)
    assert len({token for text in texts for token in text}) > 3 * MAX_TOKENS


def test_every_bfloat16_token_is_the_references_choice_but_for_rounding(
    plain: EngineProcess, checkpoints: Checkpoints, remote_run: RemoteRun
) -> None:
    outcomes = remote_run("nano", dtype="bfloat16").outcomes
    plain.load(plain_arguments(checkpoints("nano"), dtype="bfloat16"))
    margins = [plain.margins(prompt, outcome.tokens) for prompt, outcome in zip(PROMPTS, outcomes)]
    assert max(map(max, margins)) <= BFLOAT16_MARGIN


def test_two_engines_get_the_right_tokens_from_one_plane_at_the_same_time(
    remote: EngineProcess, second: EngineProcess, checkpoints: Checkpoints, reference: Reference
) -> None:
    expected = reference("nano").outcomes
    with PlaneProcess(checkpoints("nano"), dtype="float32", num_groups=4) as plane:
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
    remote: EngineProcess, plain: EngineProcess, checkpoints: Checkpoints
) -> None:
    prompts = make_prompts(8, seed=1, shortest=30, longest=60)
    plain.load(plain_arguments(checkpoints("nano")))
    expected = plain.generate(prompts, max_tokens=4)
    with PlaneProcess(checkpoints("nano"), dtype="float32", num_groups=2, max_rows=64) as plane:
        remote.load(remote_arguments(plane.model, max_model_len=64))
        assert remote.generate(prompts, max_tokens=4) == expected


def test_runs_outside_of_a_scheduled_step_are_answered(remote: EngineProcess, checkpoints: Checkpoints) -> None:
    with PlaneProcess(checkpoints("nano"), dtype="float32", num_groups=2) as plane:
        remote.load(remote_arguments(plane.model))
        for num_tokens in (1, 512):
            assert not remote.do("dummy_run", num_tokens=num_tokens)
