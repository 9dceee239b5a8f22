"""Training goes on after a kill as if nothing had happened, and a batch depends on its step alone."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from training import loop
from training.loop import TrainConfig, batch_of, exempt_tokens, learning_rate, read_log, train
from training.model import NANO, build

TINY = {**NANO, "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "moe_intermediate_size": 8}
TINY |= {"intermediate_size": 32, "kv_lora_rank": 16, "q_lora_rank": 16, "num_attention_heads": 1}
TINY |= {"num_key_value_heads": 1, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
CONFIG = TrainConfig(steps=8, batch_size=2, length=16, warmup_steps=2, checkpoint_every=2)
TEXT = np.random.default_rng(0).integers(3, 64, 1000).astype(np.uint16)


class Killed(Exception):
    pass


def test_a_run_that_is_killed_goes_on_from_its_last_checkpoint_to_the_same_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = train(CONFIG, TEXT, tmp_path / "a", device="cpu", fields=TINY)

    step_fn = loop._step
    steps_run = []

    def dies_at_five(*args: object) -> dict[str, float]:
        steps_run.append(args[-1])
        if steps_run[-1] == 5 and len(steps_run) == 6:
            raise Killed
        return step_fn(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "_step", dies_at_five)
    with pytest.raises(Killed):
        train(CONFIG, TEXT, tmp_path / "b", device="cpu", fields=TINY)
    resumed = train(CONFIG, TEXT, tmp_path / "b", device="cpu", fields=TINY)

    assert steps_run == [0, 1, 2, 3, 4, 5, 4, 5, 6, 7]
    for ours, theirs in zip(resumed.parameters(), undisturbed.parameters()):
        assert torch.equal(ours, theirs)
    assert [r["loss"] for r in read_log(tmp_path / "b")] == [r["loss"] for r in read_log(tmp_path / "a")]


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(replace(CONFIG, stop_at=2), TEXT, tmp_path, device="cpu", fields=TINY)
    before = (tmp_path / "state.pt").read_bytes()

    def dies(fd: int) -> None:
        raise Killed

    monkeypatch.setattr(os, "fsync", dies)
    with pytest.raises(Killed):
        train(replace(CONFIG, stop_at=4), TEXT, tmp_path, device="cpu", fields=TINY)
    assert (tmp_path / "state.pt").read_bytes() == before


def test_a_folder_with_another_run_is_refused(tmp_path: Path) -> None:
    train(replace(CONFIG, stop_at=2), TEXT, tmp_path, device="cpu", fields=TINY)
    with pytest.raises(ValueError, match="another peak_lr"):
        train(replace(CONFIG, peak_lr=1.0), TEXT, tmp_path, device="cpu", fields=TINY)


def test_an_epoch_has_every_window_once() -> None:
    config = replace(CONFIG, batch_size=1, length=10)
    text = np.arange(105, dtype=np.uint16)
    starts = sorted(int(batch_of(step, text, config)[0, 0]) for step in range(9))
    assert [start - starts[0] for start in starts] == list(range(0, 90, 10))
    assert starts[-1] + 10 < len(text)


def test_about_a_tenth_of_the_sequences_is_exempt() -> None:
    config = replace(CONFIG, batch_size=8, length=4)
    masks = torch.stack([exempt_tokens(step, config) for step in range(500)]).view(500, 8, 4)
    assert torch.equal(masks.all(dim=-1), masks.any(dim=-1))
    assert 0.08 < masks.float().mean() < 0.12


def test_the_learning_rate_warms_up_holds_and_falls_to_zero() -> None:
    config = TrainConfig(steps=100, warmup_steps=10, peak_lr=1.0, decay_share=0.5)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0 == rates[49]
    assert rates[75] == pytest.approx(0.5) and rates[99] == pytest.approx(0.02)


def test_the_balanced_layer_computes_what_transformers_does() -> None:
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    ours, _ = build(TINY, seed=3)
    theirs = DeepseekV2ForCausalLM(DeepseekV2Config(**TINY))
    theirs.load_state_dict(ours.state_dict())
    ids = torch.from_numpy(TEXT[:50].astype(np.int64)).unsqueeze(0)
    torch.testing.assert_close(ours(input_ids=ids).logits, theirs(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


def test_a_record_has_all_that_the_report_draws(tmp_path: Path) -> None:
    train(replace(CONFIG, stop_at=1), TEXT, tmp_path, device="cpu", fields=TINY)
    record = json.loads((tmp_path / "log.jsonl").read_text())
    assert {"step", "loss", "expert", "device", "communication", "dropped", "tokens_per_s"} <= record.keys()
    assert 0 <= record["dropped"] < 1
