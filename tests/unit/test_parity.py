"""The verdict of `expertmesh parity` on cases made by hand, and the small pure parts around it."""

import argparse
import json
from pathlib import Path

import pytest

from deploy import parity
from deploy.local import RunningCluster
from deploy.parity_traffic import MAX_PROMPT, MIN_PROMPT, make_prompts
from deploy.parity_verdict import Answers, Composition, Pass, Reference, Verdict, judge, last_place
from deploy.reference import change
from experts.errors import ConfigError

TOGETHER = ((1, 2, 3, 4), (5, 6, 7, 8), (9, 10, 11, 12), (13, 14, 15, 16))
NO_MARGINS = ((0.0,) * 4,) * 4


def with_token(
    tokens: tuple[tuple[int, ...], ...], prompt: int, position: int, token: int
) -> tuple[tuple[int, ...], ...]:
    rows = [list(row) for row in tokens]
    rows[prompt][position] = token
    return tuple(map(tuple, rows))


def with_margin(prompt: int, position: int, margin: float) -> tuple[tuple[float, ...], ...]:
    rows = [list(row) for row in NO_MARGINS]
    rows[prompt][position] = margin
    return tuple(map(tuple, rows))


def a_pass(
    tokens: tuple[tuple[int, ...], ...] = TOGETHER,
    margins: tuple[tuple[float, ...], ...] = NO_MARGINS,
    *,
    name: str = "under load",
    like: Composition = "together",
) -> Pass:
    return Pass(name=name, like=like, answers=Answers(tokens=tokens, margins=margins))


def a_reference(
    one_by_one: tuple[tuple[int, ...], ...] = TOGETHER,
    *,
    largest_change: float = 0.5,
    largest_logit: float = 10.0,
    margins: tuple[tuple[float, ...], ...] = NO_MARGINS,
) -> Reference:
    return Reference(
        together=Answers(tokens=TOGETHER, margins=NO_MARGINS),
        one_by_one=Answers(tokens=one_by_one, margins=margins),
        largest_change=largest_change,
        largest_logit=largest_logit,
    )


def reason(verdict: Verdict) -> str:
    assert not verdict.holds
    (only,) = verdict.reasons
    return only


def test_identical_sequences_hold_in_every_dtype():
    for dtype in ("float32", "bfloat16", "float16"):
        verdict = judge(dtype, (a_pass(), a_pass(name="alone", like="one by one")), a_reference())
        assert verdict.holds and not verdict.reasons
        assert verdict.first_difference is None


def test_one_different_token_fails_in_float32_however_small_its_margin():
    ours = a_pass(with_token(TOGETHER, 2, 1, 99), with_margin(2, 1, 1e-7))
    verdict = judge("float32", (a_pass(name="alone"), ours), a_reference())
    assert "under load: 3 of 4 sequences" in reason(verdict)
    assert verdict.rounding_margin is None


def test_float32_is_compared_with_all_prompts_together_even_when_asked_alone():
    changed = with_token(TOGETHER, 0, 3, 99)
    verdict = judge("float32", (a_pass(changed, name="alone", like="one by one"),), a_reference(changed))
    assert not verdict.holds


def test_the_first_difference_names_prompt_position_both_tokens_and_the_margin():
    ours = a_pass(with_token(with_token(TOGETHER, 1, 2, 77), 3, 0, 88), with_margin(1, 2, 0.25))
    first = judge("float32", (ours,), a_reference()).first_difference
    assert first is not None
    assert (first.pass_name, first.prompt, first.position) == ("under load", 1, 2)
    assert (first.cluster_token, first.reference_token, first.margin) == (77, 7, 0.25)
    assert str(first) == ("under load: prompt 1, position 2: vLLM says token 7, the cluster 77, whose margin is 0.25")


def test_a_bfloat16_token_within_the_rounding_margin_holds():
    ours = a_pass(with_token(TOGETHER, 0, 0, 99), with_margin(0, 0, 0.5))
    changed = with_token(TOGETHER, 3, 3, 99)
    verdict = judge("bfloat16", (ours,), a_reference(changed))
    assert verdict.holds
    assert (verdict.worst_margin, verdict.rounding_margin) == (0.5, 0.5)
    assert (verdict.passes[0].identical, verdict.own_identical) == (3, 3)


def test_a_bfloat16_token_beyond_the_rounding_margin_fails():
    ours = a_pass(with_token(TOGETHER, 0, 0, 99), with_margin(0, 0, 0.51))
    changed = with_token(TOGETHER, 3, 3, 99)
    assert "prompt 0, position 0: token 99 is 0.51" in reason(judge("bfloat16", (ours,), a_reference(changed)))


def test_a_margin_that_is_no_number_fails():
    ours = a_pass(margins=with_margin(0, 0, float("nan")))
    assert "nan" in reason(judge("bfloat16", (ours,), a_reference()))


def test_the_rounding_margin_is_at_least_one_last_place_of_the_largest_logit():
    reference = a_reference(largest_change=0.0, largest_logit=15.6)
    assert judge("bfloat16", (a_pass(),), reference).rounding_margin == 0.0625
    assert judge("float16", (a_pass(),), reference).rounding_margin == 0.0078125


def test_the_rounding_margin_is_at_least_the_worst_margin_of_the_references_own_tokens():
    reference = a_reference(largest_change=0.5, margins=with_margin(0, 0, 0.75))
    assert judge("bfloat16", (a_pass(),), reference).rounding_margin == 0.75


def test_a_smaller_share_than_the_references_own_fails():
    two_changed = with_token(with_token(TOGETHER, 0, 0, 99), 1, 0, 99)
    own_changed = with_token(TOGETHER, 3, 3, 99)
    assert "2 of 4 sequences" in reason(judge("bfloat16", (a_pass(two_changed),), a_reference(own_changed)))


def test_the_share_is_taken_over_all_passes():
    two_changed = with_token(with_token(TOGETHER, 0, 0, 99), 1, 0, 99)
    own_changed = with_token(TOGETHER, 3, 3, 99)
    alone = a_pass(own_changed, name="alone", like="one by one")
    verdict = judge("bfloat16", (alone, a_pass(two_changed)), a_reference(own_changed))
    assert verdict.holds  # 4 and 2 of 8, and vLLM has 3 of 4 with itself


def test_where_the_reference_never_differs_from_itself_a_tenth_of_the_sequences_may():
    changed = a_pass(with_token(TOGETHER, 0, 0, 99))
    assert judge("bfloat16", (changed, changed, a_pass(), a_pass(), a_pass()), a_reference()).holds  # 18 of 20
    assert "9 of 12" in reason(judge("bfloat16", (changed, changed, changed), a_reference()))
    assert "3 of 4" in reason(judge("bfloat16", (changed,), a_reference()))


def test_an_alone_pass_in_bfloat16_is_held_against_one_by_one():
    own_changed = with_token(TOGETHER, 3, 3, 99)
    verdict = judge("bfloat16", (a_pass(own_changed, name="alone", like="one by one"),), a_reference(own_changed))
    assert verdict.holds
    assert (verdict.passes[0].identical, verdict.passes[0].identical_to_together) == (4, 3)


def test_many_tokens_off_the_top_fail_where_the_reference_has_none():
    ours = a_pass(margins=tuple((0.25, 0.0, 0.0, 0.0) for _ in range(4)))
    assert "4 tokens are not vLLM's largest logit, and at most 3" in reason(judge("bfloat16", (ours,), a_reference()))


def test_a_short_answer_fails_in_every_dtype():
    short = (*TOGETHER[:3], TOGETHER[3][:2])
    ours = a_pass(short, (*NO_MARGINS[:3], (0.0, 0.0)))
    for dtype in ("float32", "bfloat16"):
        verdict = judge(dtype, (ours,), a_reference())
        assert not verdict.holds
        assert verdict.first_difference is not None
        assert (verdict.first_difference.position, verdict.first_difference.cluster_token) == (2, None)


def test_no_passes_are_not_a_success():
    with pytest.raises(ValueError, match="at least one pass"):
        judge("float32", (), a_reference())


def test_last_places_of_powers_of_two():
    assert last_place(1.0, "bfloat16") == 2.0**-7
    assert last_place(-1.99, "bfloat16") == 2.0**-7
    assert last_place(0.0, "bfloat16") == 0.0


def test_the_change_of_a_position_is_that_of_the_difference_of_two_logits():
    assert change({1: 5.0, 2: 4.0, 3: 3.0}, {1: 5.5, 2: 4.25, 4: 1.0}) == 0.25
    assert change({1: 5.0}, {2: 5.0}) == 0.0


def test_prompts_without_a_tokenizer_are_random_ids_of_the_vocabulary(tmp_path: Path):
    prompts = make_prompts(tmp_path, 40, vocab_size=100)
    assert prompts == make_prompts(tmp_path, 40, vocab_size=100)
    assert all(0 <= token < 100 for prompt in prompts for token in prompt)
    lengths = {len(prompt) for prompt in prompts}
    assert min(lengths) == MIN_PROMPT and max(lengths) <= MAX_PROMPT and len(lengths) > 20
    assert len(set(map(tuple, prompts))) == 40


@pytest.mark.parametrize("is_running", [True, False])
def test_a_cluster_that_may_drop_rows_is_not_compared(
    nano: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_running: bool
):
    config = {"model": {"checkpoint": str(nano), "max_model_len": 256}, "router": {"capacity_factor": 1.25}}
    running = RunningCluster(
        pid=1,
        http="",
        grpc="",
        model="nano",
        checkpoint=str(nano),
        dtype="float32",
        num_groups=4,
        attention_replicas=1,
        max_model_len=256,
        log_dir="",
        runtime_dir="",
        ray_address="",
        ray_cpus=4,
        config=config,
        started_s=0.0,
    )
    monkeypatch.setattr(RunningCluster, "find", lambda: running if is_running else None)
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    parser = argparse.ArgumentParser()
    parity.add_arguments(parser)
    with pytest.raises(ConfigError, match=r"router\.capacity_factor is 1\.25, so rows may be dropped"):
        parity.run(parser.parse_args([] if is_running else ["--config", str(tmp_path / "c.yaml")]))
